#include "hot_rows.h"

#include <algorithm>
#include <numeric>
#include <vector>

namespace dqrm {
namespace {

constexpr uint16_t kSeen = 0x8000;  // in `uses`, while a call lasts: the row is among its rows
constexpr int64_t kAhead = 16;

// splitmix64, as in dqrm.kernels.rounding.
uint64_t mixed(uint64_t z) {
  z += 0x9E3779B97F4A7C15u;
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
  return z ^ (z >> 31);
}

int64_t set_of(const HotRows& hot, int64_t row) {
  const uint64_t sets = uint64_t(hot.slots / HotRows::kWays);
  return int64_t(mixed(uint64_t(row)) & (sets - 1)) * HotRows::kWays;
}

void take(const HotRows& hot, int64_t slot, int64_t row) {
  hot.rows[slot] = row;
  hot.uses[slot] = HotRows::kFirstUses | kSeen;
  std::fill_n(hot.values + slot * hot.dim, hot.dim, 0.0f);
}

// Sorts the evicted rows, their values with them.
void sort(const Evicted& evicted, int64_t count, int64_t dim) {
  std::vector<int64_t> order(static_cast<size_t>(count));
  std::iota(order.begin(), order.end(), 0);
  std::sort(order.begin(), order.end(),
            [&](int64_t a, int64_t b) { return evicted.rows[a] < evicted.rows[b]; });
  std::vector<int64_t> rows(evicted.rows, evicted.rows + count);
  std::vector<float> values(evicted.values, evicted.values + count * dim);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t from = order[size_t(i)];
    evicted.rows[i] = rows[size_t(from)];
    std::copy_n(values.data() + from * dim, dim, evicted.values + i * dim);
  }
}

}  // namespace

int64_t place_rows(const HotRows& hot, const int64_t* rows, int64_t count, int64_t* slots,
                   const Evicted& evicted) {
  // Until a row's turn comes, `slots` holds where its set begins.
  const auto fetch = [&](int64_t i) {
    slots[i] = set_of(hot, rows[i]);
    __builtin_prefetch(hot.rows + slots[i]);
    __builtin_prefetch(hot.uses + slots[i], 1);
  };
  for (int64_t i = 0; i < std::min(kAhead, count); ++i) fetch(i);
  for (int64_t i = 0; i < count; ++i) {
    if (i + kAhead < count) fetch(i + kAhead);
    const int64_t set = slots[i];
    slots[i] = -1;
    for (int64_t slot = set; slot < set + HotRows::kWays; ++slot) {
      if (hot.rows[slot] != rows[i]) continue;
      slots[i] = slot;
      hot.uses[slot] = uint16_t(std::min<int>(hot.uses[slot] + 1, HotRows::kMostUses) | kSeen);
    }
  }
  int64_t gone = 0;
  for (int64_t i = 0; i < count; ++i) {
    if (slots[i] >= 0) continue;
    const int64_t set = set_of(hot, rows[i]);
    int64_t least = -1;
    for (int64_t slot = set; slot < set + HotRows::kWays && slots[i] < 0; ++slot) {
      if (hot.rows[slot] < 0) {
        slots[i] = slot;
      } else if ((hot.uses[slot] & kSeen) == 0 &&
                 (least < 0 || hot.uses[slot] < hot.uses[least])) {
        least = slot;
      }
    }
    if (slots[i] < 0) {
      if (least < 0) continue;
      if (hot.uses[least] > 0) {
        --hot.uses[least];
        continue;
      }
      const float* residual = hot.values + least * hot.dim;
      if (std::any_of(residual, residual + hot.dim, [](float value) { return value != 0.0f; })) {
        if (gone == evicted.room) continue;
        evicted.rows[gone] = hot.rows[least];
        std::copy_n(residual, hot.dim, evicted.values + gone * hot.dim);
        ++gone;
      }
      slots[i] = least;
    }
    take(hot, slots[i], rows[i]);
  }
  for (int64_t i = 0; i < count; ++i) {
    if (slots[i] >= 0) hot.uses[slots[i]] &= uint16_t(~kSeen);
  }
  sort(evicted, gone, hot.dim);
  return gone;
}

}  // namespace dqrm
