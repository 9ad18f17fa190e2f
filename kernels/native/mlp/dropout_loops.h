// Units dropped at random; defined in dqrm.kernels.dropout.
#pragma once

#include <cstdint>

#include "../common/level.h"

namespace dqrm {

struct DropoutLoops {
  // Multiplies values of row `row` by 0, where the upper 24 random bits are below `dropped`, or by
  // `factor`.
  void (*drop)(float* values, int64_t count, uint64_t key, int64_t row, uint32_t dropped,
               float factor);
};

DQRM_DECLARE_LOOPS(DropoutLoops, dropout_loops)

}  // namespace dqrm
