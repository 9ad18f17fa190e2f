// Codecs over whole tensors, split over threads; results do not depend on how many.
#pragma once

#include "loops.h"

namespace dqrm {

// Returns the first row that is not finite, or -1.
int64_t encode_rows(const CodeLoops& loops, const CodedRows& rows, const float* values,
                    float* residual, bool carried, const Rounding& rounding, int threads);

// Targets, unless null, are rows of `out`; where they do not ascend, one thread adds them in order.
void decode_rows(const CodeLoops& loops, const CodedRows& rows, float* out,
                 const int64_t* targets, bool add, float alpha, int threads);

// Blocks of `block` values, a multiple of eight or all of them, with a float32 scale each.
struct SignedBlocks {
  int64_t count;  // values
  int64_t block;
  uint8_t* bits;
  uint8_t* scales;

  int64_t blocks() const { return (count + block - 1) / block; }
};

// Returns the first block that is not finite, or -1.
int64_t encode_signs(const SignLoops& loops, const SignedBlocks& blocks, const float* gradient,
                     float* residual, bool squares, int threads);

void decode_signs(const SignLoops& loops, const SignedBlocks& blocks, float* out, bool add,
                  float alpha, int threads);

}  // namespace dqrm
