// The dot interaction over a batch, split over threads by samples.
#pragma once

#include "loops.h"

namespace dqrm {

// Throws std::bad_alloc before anything is written.
void interaction_forward(const InteractionLoops& loops, const Interaction& work, int64_t batch,
                         int threads);
void interaction_backward(const InteractionLoops& loops, const Interaction& work, int64_t batch,
                          int threads);

}  // namespace dqrm
