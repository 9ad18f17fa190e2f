// Asking for rows before they are looked up.
//
// For files named *_loops.cpp only; see common/level.h.
#pragma once

#include "loops.h"

namespace dqrm {
namespace DQRM_LEVEL {
namespace {

// Samples whose bags of one table are looked up before those of the next table. Fewer cost more
// time between tables, more scatter the writes over more pages than the TLB holds.
constexpr int64_t kBlock = 128;

// Walks the ids in the order of the look-ups, ahead of them, and asks for their rows.
struct Prefetcher {
  int64_t at, end;       // in the ids of one table for a block of samples
  int64_t table, block;  // those: the table, the block's first sample
  int64_t last_sample;   // where the work ends
  const uint8_t* codes;
  int64_t row_bytes;
  int64_t last_byte;
  const float* scales;
  int64_t scale_mask;
};

// Enters the next part that has ids; false when there is none.
__attribute__((noinline)) bool refill(const PackedBatch& batch, Prefetcher& ahead) {
  do {
    if (++ahead.table == batch.num_tables) {
      ahead.table = 0;
      ahead.block += kBlock;
    }
    if (ahead.block >= ahead.last_sample) {
      ahead.table = batch.num_tables - 1;
      return false;
    }
    const int64_t bag = ahead.table * batch.samples;
    const int64_t next = ahead.block + kBlock;
    const int64_t begin = bag + ahead.block;
    const int64_t end = bag + (next < ahead.last_sample ? next : ahead.last_sample);
    ahead.at = batch.offsets == nullptr ? begin : batch.offsets[begin];
    ahead.end = batch.offsets == nullptr ? end : batch.offsets[end];
  } while (ahead.at == ahead.end);
  const PackedTable& table = batch.tables[ahead.table];
  ahead.codes = table.codes;
  ahead.row_bytes = table.row_bytes;
  ahead.last_byte = table.last_byte;
  ahead.scales = table.scales;
  ahead.scale_mask = table.scale_mask;
  return true;
}

// Asks for all lines of a row and for its scale; almost without branches, twice for the same line
// if need be. Inlined by order: GCC takes a function that only prefetches for one without effect
// and drops calls of it.
[[gnu::always_inline]] inline void prefetch_row(const Prefetcher& ahead, int64_t id) {
  const uint8_t* row = ahead.codes + id * ahead.row_bytes;
  __builtin_prefetch(row);
  __builtin_prefetch(row + ahead.last_byte);
  for (int64_t byte = kCacheLine; byte < ahead.row_bytes; byte += kCacheLine) __builtin_prefetch(row + byte);
  __builtin_prefetch(ahead.scales + (id & ahead.scale_mask));
}

template <typename Id>
inline void prefetch_next(const PackedBatch& batch, Prefetcher& ahead) {
  if (ahead.at == ahead.end && !refill(batch, ahead)) return;
  prefetch_row(ahead, static_cast<const Id*>(batch.ids)[ahead.at++]);
}

}  // namespace
}  // namespace DQRM_LEVEL
}  // namespace dqrm
