// The loops of the dot interaction, one table for every level.
//
// Symbols: B samples, F vectors a sample, D values a vector. The triangle of a sample holds the
// products of the vectors i and j < i (j <= i with `itself`), row after row.
#pragma once

#include <cstdint>

#include "../common/level.h"

namespace dqrm {

struct Interaction {
  int64_t vectors;  // F
  int64_t dim;      // D
  bool itself;
  const float* input;  // [B, F, D]
  int64_t input_stride;
  // Forward writes [B, D + pairs] at `output`; backward reads the gradient of that at `grad` and
  // writes the gradient of the input at `output`.
  const float* grad;
  int64_t grad_stride;
  float* output;
  int64_t output_stride;
};

struct InteractionLoops {
  // Floats of scratch memory, zero and aligned to 64 bytes, that `forward` needs.
  int64_t (*scratch)(const Interaction& work);
  // Samples [begin, end). Nothing outside their own rows is written, not even for a moment.
  void (*forward)(const Interaction& work, int64_t begin, int64_t end, float* scratch);
  void (*backward)(const Interaction& work, int64_t begin, int64_t end);
};

DQRM_DECLARE_LOOPS(InteractionLoops, interaction_loops)

}  // namespace dqrm
