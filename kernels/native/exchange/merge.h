// Deduplication of rows by sorting.
#pragma once

#include "loops.h"

namespace dqrm {

struct RowValues {
  const int64_t* rows;  // [N], none negative
  const float* values;  // [N, D]
  int64_t count;        // N
  int64_t dim;          // D
};

// Writes the distinct rows, ascending, and the sums of their values, in the order in which they
// occur; room for all N is needed. Returns how many there are. Throws std::invalid_argument for a
// negative row, before anything is written.
int64_t merge_rows(const MergeLoops& loops, const RowValues& input, int64_t* rows, float* sums,
                   int threads);

}  // namespace dqrm
