// Look-ups in packed tables: what the loops of every level work on. Method-less, see level.h.
#pragma once

#include <cstdint>

#include "../common/level.h"

namespace dqrm {

constexpr int64_t kCacheLine = 64;

// One table's codes, laid out as dqrm/kernels/code_layout.py describes.
struct PackedTable {
  const uint8_t* codes;  // [rows, row_bytes]
  const float* scales;   // [rows] or [1]; null at 32 bits
  int64_t rows;
  int64_t row_bytes;
  int64_t last_byte;   // of a row when it may lie in a cache line of its own, else 0
  int64_t scale_mask;  // the scale of row r is scales[r & scale_mask]: all ones, or 0
  int32_t bits;        // 2, 4, 8, 16 or 32
};

// Ids of a batch: table-major, bags of a table in the order of the samples.
struct PackedBatch {
  const PackedTable* tables;
  int64_t num_tables;
  int64_t samples;
  int64_t dim;
  const void* ids;         // int64 if wide, else int32
  const int64_t* offsets;  // [num_tables * samples + 1] into ids; null: one id a bag
  const float* weights;    // one an id, or null
  float* out;              // of sample s and table t at out + s * sample_stride + t * dim
  int64_t sample_stride;
  bool wide;
  bool mean;
  bool streamed;  // the output is too large for the caches: write past them
};

struct PackedLoops {
  // Position of the first id outside [0, rows), or count.
  int64_t (*first_outside)(const void* ids, bool wide, int64_t count, int64_t rows);
  // Pools the bags of samples [begin, end) of all tables. Ids and offsets have been checked.
  void (*look_up)(const PackedBatch& batch, int64_t begin, int64_t end);
};

DQRM_DECLARE_LOOPS(PackedLoops, packed_loops)

}  // namespace dqrm
