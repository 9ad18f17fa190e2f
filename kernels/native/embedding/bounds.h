// How a written row moves the bounds above it; for *_loops.cpp only. The tree is in maxima.h.
#pragma once

#include "rows.h"

namespace dqrm {
namespace DQRM_LEVEL {
namespace {

// Inlined by force, as prefetch_bytes.
[[gnu::always_inline]] inline void prefetch_bound(const Bounds& bounds, int64_t row) {
  if (bounds.levels != 0) __builtin_prefetch(bounds.level[0] + (row >> kFanoutBits), 1, 3);
}

// Raises the nodes above a leaf to `value`. Several threads may raise one node.
inline void raise_above(const Bounds& bounds, int64_t row, float value) {
  int64_t node = row >> kFanoutBits;
  for (int level = 1; level < bounds.levels; ++level) {
    node >>= kFanoutBits;
    float* at = bounds.level[level] + node;
    float found;
    __atomic_load(at, &found, __ATOMIC_RELAXED);
    do {
      if (found >= value) return;
    } while (!__atomic_compare_exchange(at, &found, &value, true, __ATOMIC_RELAXED,
                                        __ATOMIC_RELAXED));
  }
}

// Marks a leaf as possibly too high.
inline void loosen(const Bounds& bounds, float* leaf, float bound) {
  *leaf = -bound;
  float root;
  __atomic_load(bounds.level[bounds.levels - 1], &root, __ATOMIC_RELAXED);
  if (__builtin_fabsf(root) <= bound) __atomic_store_n(bounds.unsettled, 1, __ATOMIC_RELAXED);
}

// Takes in that a row changed. A leaf is written only by the thread that owns its rows.
inline void keep_bound(const Bounds& bounds, int64_t row, const F32* before, const F32* after,
                       int vectors) {
  float* leaf = bounds.level[0] + (row >> kFanoutBits);
  const float bound = __builtin_fabsf(*leaf);
  const F32 limit = all(bound);
  F32 most{}, held{};
  for (int k = 0; k < vectors; ++k) {
    most = max(abs(after[k]), most);
    held = max(abs(before[k]), held);
  }
  // No row was above the bound.
  if (!any_greater_or_at_least(most, limit, held, limit)) return;
  const float value = largest_lane(most);
  if (value > bound) {
    *leaf = value;
    raise_above(bounds, row, value);
  } else {
    loosen(bounds, leaf, bound);
  }
}

}  // namespace
}  // namespace DQRM_LEVEL
}  // namespace dqrm
