// Places for the residuals of the rows that come again most often: a cache of bounded size.
#pragma once

#include <cstdint>

namespace dqrm {

// Slots in sets of kWays; a row lives in the set its hash names.
struct HotRows {
  static constexpr int64_t kWays = 4;
  // Misses of its set that a row outlives without being seen again, at first and at most.
  static constexpr uint16_t kFirstUses = 4, kMostUses = 0x7FFF;

  int64_t* rows;   // [slots]; -1 where a slot is free
  uint16_t* uses;  // [slots]
  float* values;   // [slots, dim] residuals
  int64_t slots;   // kWays times a power of two
  int64_t dim;
};

struct Evicted {
  int64_t* rows;  // [room], written in ascending order
  float* values;  // [room, dim]
  int64_t room;
};

// Finds or makes a slot for each of the rows [count], which ascend without repeats, and writes it,
// or -1. A row that is new takes a free slot of its set, else that of the row used least: every such
// miss counts one use of it down, and at none it goes, unless it is among `rows`. What it leaves is
// written to `evicted`, where it is not all zero. Returns how many were.
int64_t place_rows(const HotRows& hot, const int64_t* rows, int64_t count, int64_t* slots,
                   const Evicted& evicted);

}  // namespace dqrm
