#include "collect.h"

#include <algorithm>
#include <bit>

namespace dqrm {
namespace {

// Ids are spread by the golden ratio (Knuth, The Art of Computer Programming 3, 6.4).
constexpr uint64_t kSpread = 0x9E3779B97F4A7C15u;

// Which of `parts` owns the block an id lies in.
int64_t owner(uint64_t id, int64_t parts) {
  const uint64_t spread = (id >> kFanoutBits) * kSpread >> 32;
  return int64_t(spread * uint64_t(parts) >> 32);
}

}  // namespace

inline void Collector::add(int64_t row, int32_t id) {
  row_[size_t(count_)] = row;
  first_[size_t(count_)] = last_[size_t(count_)] = id;
  ++count_;
}

inline void Collector::append(uint32_t slot, int32_t id) {
  next_[size_t(last_[slot])] = id;
  last_[slot] = id;
}

// A table with few rows has a slot for each.
template <typename Id>
void Collector::by_address(const Id* ids, int64_t count, int64_t rows) {
  slots_.assign(size_t(rows), 0);
  for (int64_t k = 0; k < count; ++k) {
    uint32_t& slot = slots_[size_t(ids[k])];
    if (slot != 0) {
      append(slot - 1, int32_t(k));
    } else {
      add(int64_t(ids[k]), int32_t(k));
      slot = uint32_t(count_);
    }
  }
}

template <typename Id, bool Owned>
void Collector::by_hash(const Id* ids, int64_t count, int64_t part, int64_t parts) {
  // At most half of the slots are taken, or a search would be long.
  const uint64_t capacity = std::bit_ceil(uint64_t(2 * count));
  const int shift = 64 - std::countr_zero(capacity);
  slots_.assign(capacity, 0);
  for (int64_t k = 0; k < count; ++k) {
    const uint64_t id = uint64_t(ids[k]);
    if constexpr (Owned) {
      if (owner(id, parts) != part) continue;
    }
    for (uint64_t at = id * kSpread >> shift;; at = (at + 1) & (capacity - 1)) {
      const uint32_t slot = slots_[at];
      if (slot == 0) {
        add(int64_t(id), int32_t(k));
        slots_[at] = uint32_t(count_);
        break;
      }
      if (row_[slot - 1] == int64_t(id)) {
        append(slot - 1, int32_t(k));
        break;
      }
    }
  }
}

void Collector::fill_bags(const Bags& bags, int64_t batch) {
  if (bags.offsets == nullptr) return;
  bag_.resize(size_t(bags.end - bags.begin));
  for (int64_t bag = 0; bag < batch; ++bag) {
    std::fill(bag_.begin() + (bags.offsets[bag] - bags.begin),
              bag_.begin() + (bags.offsets[bag + 1] - bags.begin), int32_t(bag));
  }
}

TouchedRows Collector::view(const Bags& bags) const {
  return {row_.data(), count_, first_.data(), next_.data(),
          bags.offsets != nullptr ? bag_.data() : nullptr};
}

TouchedRows Collector::collect(const Bags& bags, int64_t batch, int64_t rows, int64_t part,
                               int64_t parts) {
  const int64_t count = bags.end - bags.begin;
  const size_t size = size_t(count);
  count_ = 0;
  if (row_.size() < size) {
    row_.resize(size);
    first_.resize(size);
    last_.resize(size);
  }
  next_.assign(size, -1);
  fill_bags(bags, batch);
  if (count == 0) return view(bags);
  const auto run = [&](const auto* ids) {
    using Id = std::remove_cvref_t<decltype(*ids)>;
    if (parts > 1) {
      by_hash<Id, true>(ids, count, part, parts);
    } else if (rows <= 2 * count) {
      by_address(ids, count, rows);
    } else {
      by_hash<Id, false>(ids, count, part, parts);
    }
  };
  if (bags.wide) {
    run(static_cast<const int64_t*>(bags.ids) + bags.begin);
  } else {
    run(static_cast<const int32_t*>(bags.ids) + bags.begin);
  }
  return view(bags);
}

TouchedRows Collector::collect_sorted(const Bags& bags, int64_t batch, int64_t rows) {
  collect(bags, batch, rows, 0, 1);
  // Rows with their numbers in the low bits, by 11 bits at a time from the lowest.
  const size_t count = size_t(count_);
  constexpr int kDigit = 11;
  keys_.resize(count);
  spare_.resize(count);
  std::vector<int32_t> order(count), other(count);
  for (size_t u = 0; u < count; ++u) {
    keys_[u] = uint64_t(row_[u]);
    order[u] = int32_t(u);
  }
  for (int shift = 0; shift < 63 && (uint64_t(rows - 1) >> shift) != 0; shift += kDigit) {
    uint32_t starts[(1 << kDigit) + 1] = {};
    for (size_t u = 0; u < count; ++u) ++starts[(keys_[u] >> shift & ((1 << kDigit) - 1)) + 1];
    for (int digit = 0; digit < 1 << kDigit; ++digit) starts[digit + 1] += starts[digit];
    for (size_t u = 0; u < count; ++u) {
      const uint32_t to = starts[keys_[u] >> shift & ((1 << kDigit) - 1)]++;
      spare_[to] = keys_[u];
      other[to] = order[u];
    }
    keys_.swap(spare_);
    order.swap(other);
  }
  for (size_t u = 0; u < count; ++u) {
    row_[u] = int64_t(keys_[u]);
    last_[u] = first_[size_t(order[u])];
  }
  first_.swap(last_);
  return view(bags);
}

}  // namespace dqrm
