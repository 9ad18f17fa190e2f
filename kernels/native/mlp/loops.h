// The loops of a stack of linear layers, and the memory they share.
//
// Matrices are held as operands of products, in units of 32 bits: one float, or two bfloat16
// that one instruction multiplies and adds. Two neighbours along the dimension that a product sums
// over make a unit, so a bfloat16 matrix that takes part in two products is held twice:
//
//   y  = x w^T   sums over inputs:   x in rows,  w^T in panels      (forward)
//   dx = dy w    sums over outputs:  dy in rows, w in panels        (backward)
//   dw = dy^T x  sums over rows:     dy and x in panels of row pairs (weight_gradient)
//
// A panel holds `panel_columns` columns, unit after unit, so that a product reads it as a stream.
// Backward goes through the batch in blocks of rows whose gradients stay in the cache: down to the
// first layer, then into the weights' gradients. dy is written in both forms, pairs of x are made
// when they are needed. What is beyond the last column or row is zero.
#pragma once

#include <cstdint>

#include "../common/level.h"

namespace dqrm {

// A matrix [rows, columns] of activations or gradients, units along the columns:
// [rows][row_stride]. Null if not needed.
struct MlpMatrix {
  uint32_t* rows;
  int64_t row_stride;
};

// A matrix with units along the rows: [panels][row pairs][panel_columns].
struct MlpPairs {
  uint32_t* units;
  int64_t panel_stride;
};

struct MlpLayer {
  int64_t inputs;
  int64_t outputs;
  // The largest code of the weights' grid; 0 if they are not quantized.
  float largest_code;
  // Whether the input is quantized as well, row by row, to 8 bits: `input` then holds codes.
  bool integer_input;
  bool relu;
  const float* weight;  // [outputs, inputs]
  const float* bias;    // [outputs]
  float* weight_gradient;
  float* bias_gradient;

  // The weights as operands: [panels of outputs][input units][panel_columns] and
  // [panels of inputs][output units][panel_columns].
  uint32_t* forward_panels;
  uint32_t* backward_panels;
  // y = (input_scale * scale) * (x * panels) + shift, for every output up to the end of the last
  // panel and every row; input_scale is null where it is 1.
  float* scale;
  float* shift;
  float* input_scale;  // [batch]

  MlpMatrix input;
  MlpMatrix output;  // the next layer's input; null after the last layer and before integers
  // Bit j of [panels of outputs][batch]: column j of the panel passed the ReLU. Null if not needed.
  uint32_t* active;
  int64_t batch;
  // For the rows of a block: the gradient of the output before the ReLU, times scale where
  // weights are packed as codes.
  MlpMatrix gradient;
  MlpPairs gradient_pairs;  // times input_scale instead
  float* bias_parts;   // sums of gradient over the rows of every part: [parts][panels * columns]
};

// Rows of a row-major matrix of floats.
struct MlpOutside {
  float* values;
  int64_t row_stride;
};

// Rows [begin, end) of the batch, which are one part of block [block, ..).
struct MlpPart {
  int64_t begin;
  int64_t end;
  int64_t block;
  int64_t number;
};

struct MlpLoops {
  int64_t unit;           // values in a unit
  int64_t panel_columns;
  int64_t rows;           // rows that are computed at a time; even
  int64_t pack_rows;      // weight rows packed at a time
  int64_t block_rows;     // rows of a block at most; even

  // Quantizes and packs pack_rows rows of the weight.
  void (*pack)(const MlpLayer& layer, int64_t block, bool training);
  // x, which are rows [begin, end), into layer.input.
  void (*take_input)(const MlpLayer& layer, MlpOutside x, int64_t begin, int64_t end);
  // Rows [begin, end) from layer.input to layer.output and to y, which are those rows, where these
  // are not null.
  void (*forward)(const MlpLayer& layer, int64_t begin, int64_t end, MlpOutside y);
  // The gradient that the caller has of the last layer's output.
  void (*take_gradient)(const MlpLayer& layer, MlpOutside grad, MlpPart part);
  // From layer.gradient to below.gradient, or to grad_x if there is no layer below.
  void (*backward)(const MlpLayer& layer, const MlpLayer* below, MlpPart part, MlpOutside grad_x);
  // Adds a block of rows to one panel of inputs of the weight's gradient, for panels [first, last)
  // of outputs; the block at row 0 begins the sum.
  void (*weight_gradient)(const MlpLayer& layer, int64_t panel, int64_t first, int64_t last,
                          int64_t begin, int64_t end);
  void (*bias_gradient)(const MlpLayer& layer, int64_t parts);
};

DQRM_DECLARE_LOOPS(MlpLoops, mlp_loops)

#ifdef DQRM_X86
namespace avx512bf16 {
extern const MlpLoops mlp_loops;
}
#endif

}  // namespace dqrm
