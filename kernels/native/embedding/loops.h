// The loops over rows, one table of them for each level.
#pragma once

#include "../common/level.h"
#include "types.h"

namespace dqrm {

struct LookupLoops {
  // Position of the first id outside [0, rows), `count` if there is none.
  int64_t (*first_outside)(const void* ids, bool wide, int64_t count, int64_t rows);
  // Position of the first offset below its predecessor, `count` if there is none.
  int64_t (*first_descent)(const int64_t* offsets, int64_t count);
  // Writes bags [begin, end) of a table.
  void (*look_up)(const Storage&, const TableView&, const Bags&, const Output&, int64_t begin,
                  int64_t end);
  // Largest magnitude of `count` rows; NaN does not count.
  float (*largest)(const Storage&, int64_t first_row, int64_t count);
};

struct UpdateLoops {
  // Writes the summed gradient of every touched row to values [count, D].
  void (*sum_gradients)(const Storage&, const TableView&, const TouchedRows&, const BagGradient&,
                        float* values);
  // Sums the gradients of every touched row and takes the step.
  void (*update)(const Storage&, const TableView&, const TouchedRows&, const BagGradient&,
                 const Bounds&, const RuleStep&);
  // Writes values [count, D] to rows, which count over all tables.
  void (*write_rows)(const Storage&, const int64_t* rows, int64_t count, const float* values);
};

DQRM_DECLARE_LOOPS(LookupLoops, fp32_lookup_loops)
DQRM_DECLARE_LOOPS(LookupLoops, bf16_lookup_loops)
DQRM_DECLARE_LOOPS(LookupLoops, int8_lookup_loops)
DQRM_DECLARE_LOOPS(LookupLoops, int4_lookup_loops)
DQRM_DECLARE_LOOPS(UpdateLoops, fp32_update_loops)
DQRM_DECLARE_LOOPS(UpdateLoops, bf16_update_loops)
DQRM_DECLARE_LOOPS(UpdateLoops, int8_update_loops)
DQRM_DECLARE_LOOPS(UpdateLoops, int4_update_loops)

}  // namespace dqrm
