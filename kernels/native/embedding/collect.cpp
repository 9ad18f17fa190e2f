#include "collect.h"

#include <algorithm>
#include <bit>

namespace dqrm {
namespace {

// Ids are spread by the golden ratio (Knuth, The Art of Computer Programming 3, 6.4).
constexpr uint64_t kSpread = 0x9E3779B97F4A7C15u;

// The longest run of lines asked for; the processor follows a longer run itself.
constexpr int64_t kPrefetchBytes = 512;

// Bits of a digit of the sort by row: of few rows and of many. Every pass goes over all values of a
// digit, and over all rows.
constexpr int kFewBits = 8, kManyBits = 11;
constexpr size_t kMany = 512;

// Which of `parts` owns the block an id lies in.
int64_t owner(uint64_t id, int64_t parts) {
  const uint64_t spread = (id >> kFanoutBits) * kSpread >> 32;
  return int64_t(spread * uint64_t(parts) >> 32);
}

}  // namespace

template <int Memories>
inline void Collector::add(int64_t row, int32_t id, const Ahead& ahead) {
  if constexpr (Memories > 0) {
    for (int k = 0; k < Memories; ++k) {
      const RowMemory& memory = ahead.memory[k];
      const char* at = memory.base + row * memory.bytes;
      const char* end = at + std::min(memory.bytes, kPrefetchBytes);
      do {
        __builtin_prefetch(at, 1, 3);
        at += 64;
      } while (at < end);
    }
    if (ahead.bounds != nullptr) __builtin_prefetch(ahead.bounds + (row >> kFanoutBits), 1, 3);
  }
  rows_[size_t(count_)] = {row, id, id};
  ++count_;
}

inline void Collector::append(uint32_t number, int32_t id) {
  next_[size_t(rows_[number].last)] = id;
  rows_[number].last = id;
}

// A table with few rows has a slot for each.
template <int Memories, typename Id>
void Collector::by_address(const Id* ids, int64_t count, int64_t rows, const Ahead& ahead) {
  slots_.assign(size_t(rows), 0);
  for (int64_t k = 0; k < count; ++k) {
    next_[size_t(k)] = -1;
    uint32_t& slot = slots_[size_t(ids[k])];
    if (slot != 0) {
      append(slot - 1, int32_t(k));
    } else {
      add<Memories>(int64_t(ids[k]), int32_t(k), ahead);
      slot = uint32_t(count_);
    }
  }
}

template <int Memories, bool Owned, typename Id>
void Collector::by_hash(const Id* ids, int64_t count, int64_t part, int64_t parts,
                        const Ahead& ahead) {
  // At most half of the slots are taken, or a search would be long.
  const uint64_t capacity = std::bit_ceil(uint64_t(2 * count));
  const int shift = 64 - std::countr_zero(capacity);
  slots_.assign(capacity, 0);
  for (int64_t k = 0; k < count; ++k) {
    const uint64_t id = uint64_t(ids[k]);
    next_[size_t(k)] = -1;
    if constexpr (Owned) {
      if (owner(id, parts) != part) continue;
    }
    for (uint64_t at = id * kSpread >> shift;; at = (at + 1) & (capacity - 1)) {
      const uint32_t slot = slots_[at];
      if (slot == 0) {
        add<Memories>(int64_t(id), int32_t(k), ahead);
        slots_[at] = uint32_t(count_);
        break;
      }
      if (rows_[slot - 1].row == int64_t(id)) {
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
  return {rows_.data(), count_, next_.data(), bags.offsets != nullptr ? bag_.data() : nullptr};
}

TouchedRows Collector::collect(const Bags& bags, int64_t batch, int64_t rows, int64_t part,
                               int64_t parts, const Ahead& ahead) {
  const int64_t count = bags.end - bags.begin;
  count_ = 0;
  if (rows_.size() < size_t(count)) {
    rows_.resize(size_t(count));
    next_.resize(size_t(count));
  }
  fill_bags(bags, batch);
  if (count == 0) return view(bags);
  const auto run = [&]<int Memories>(const auto* ids) {
    if (parts > 1) {
      by_hash<Memories, true>(ids, count, part, parts, ahead);
    } else if (rows <= 2 * count) {
      by_address<Memories>(ids, count, rows, ahead);
    } else {
      by_hash<Memories, false>(ids, count, part, parts, ahead);
    }
  };
  const auto run_on = [&](const auto* ids) {
    switch (ahead.count) {
      case 0:
        return run.template operator()<0>(ids);
      case 1:
        return run.template operator()<1>(ids);
      case 2:
        return run.template operator()<2>(ids);
      default:
        return run.template operator()<kMaxRowMemories>(ids);
    }
  };
  if (bags.wide) {
    run_on(static_cast<const int64_t*>(bags.ids) + bags.begin);
  } else {
    run_on(static_cast<const int32_t*>(bags.ids) + bags.begin);
  }
  return view(bags);
}

TouchedRows Collector::collect_sorted(const Bags& bags, int64_t batch, int64_t rows) {
  collect(bags, batch, rows, 0, 1, {{}, 0, nullptr});
  const size_t count = size_t(count_);
  if (spare_.size() < rows_.size()) spare_.resize(rows_.size());
  const int bits = count < kMany ? kFewBits : kManyBits;
  const size_t digits = size_t(1) << bits;
  starts_.resize(digits + 1);
  uint32_t* starts = starts_.data();
  for (int shift = 0; shift < 63 && (uint64_t(rows - 1) >> shift) != 0; shift += bits) {
    const auto digit = [&](const TouchedRow& row) {
      return uint64_t(row.row) >> shift & (digits - 1);
    };
    std::fill_n(starts, digits + 1, 0);
    for (size_t u = 0; u < count; ++u) ++starts[digit(rows_[u]) + 1];
    for (size_t value = 0; value < digits; ++value) starts[value + 1] += starts[value];
    for (size_t u = 0; u < count; ++u) spare_[starts[digit(rows_[u])]++] = rows_[u];
    rows_.swap(spare_);
  }
  return view(bags);
}

}  // namespace dqrm
