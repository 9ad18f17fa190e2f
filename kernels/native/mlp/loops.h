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
// What is beyond the last column or row is zero.
#pragma once

#include <cstdint>

#include "../common/level.h"

namespace dqrm {

// A matrix [rows, columns] of activations or gradients.
struct MlpMatrix {
  // Units along the columns: [rows][row_stride]. Null if not needed.
  uint32_t* rows;
  int64_t row_stride;
  // Units along the rows: [panels][row pairs][panel_columns], with the distances given here. Null
  // if not needed. With float units this is `rows` seen another way.
  uint32_t* pairs;
  int64_t panel_stride;
  int64_t pair_stride;
};

struct MlpLayer {
  int64_t inputs;
  int64_t outputs;
  // The largest code of the weights' grid; 0 if they are not quantized.
  float largest_code;
  bool relu;
  const float* weight;  // [outputs, inputs]
  const float* bias;    // [outputs]
  float* weight_gradient;
  float* bias_gradient;

  // The weights as operands: [panels of outputs][input units][panel_columns] and
  // [panels of inputs][output units][panel_columns].
  uint32_t* forward_panels;
  uint32_t* backward_panels;
  // y = scale * (x * panels) + shift, for every output up to the end of the last panel.
  float* scale;
  float* shift;

  MlpMatrix input;
  MlpMatrix output;    // the next layer's input, or the last layer's output if a ReLU follows
  MlpMatrix gradient;  // of the output, before the ReLU
  float* bias_parts;   // sums of gradient over the rows of every part: [parts][panels * columns]
};

// A row-major matrix of the caller's.
struct MlpOutside {
  float* values;
  int64_t row_stride;
};

struct MlpLoops {
  int64_t unit;           // values in a unit
  int64_t panel_columns;
  int64_t rows;           // rows that are computed at a time; even
  int64_t pack_rows;      // weight rows packed at a time

  // Quantizes and packs pack_rows rows of the weight.
  void (*pack)(const MlpLayer& layer, int64_t block, bool training);
  // Rows [begin, end) of the caller's input into layer.input.
  void (*take_input)(const MlpLayer& layer, MlpOutside x, int64_t begin, int64_t end);
  // From layer.input to layer.output and, if y.values is not null, to y.
  void (*forward)(const MlpLayer& layer, int64_t begin, int64_t end, MlpOutside y);
  // Rows of the gradient that the caller has of the last layer's output.
  void (*take_gradient)(const MlpLayer& layer, MlpOutside grad, int64_t begin, int64_t end,
                        int64_t part);
  // From layer.gradient to below.gradient, or to grad_x if there is no layer below.
  void (*backward)(const MlpLayer& layer, const MlpLayer* below, int64_t begin, int64_t end,
                   int64_t part, MlpOutside grad_x);
  // One panel of outputs of the gradients of weight and bias.
  void (*weight_gradient)(const MlpLayer& layer, int64_t panel, int64_t batch, int64_t parts);
};

DQRM_DECLARE_LOOPS(MlpLoops, mlp_loops)

#ifdef DQRM_X86
namespace avx512bf16 {
extern const MlpLoops mlp_loops;
}
#endif

}  // namespace dqrm
