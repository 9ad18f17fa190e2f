// The loss of logits against labels, with its gradient.
#pragma once

#include <cstdint>

#include "../common/level.h"

namespace dqrm {

struct LossLoops {
  // Returns the sum of the losses and writes (sigmoid(logit) - label) * factor. The same bits at
  // every level. gradients may be logits.
  double (*bce)(const float* logits, const float* labels, float* gradients, int64_t count,
                float factor);
};

DQRM_DECLARE_LOOPS(LossLoops, loss_loops)

}  // namespace dqrm
