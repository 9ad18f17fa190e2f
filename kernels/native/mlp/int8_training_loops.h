// The loops of a stack of linear layers whose products are INT8, and the memory they share. What
// they compute is defined in dqrm.kernels.mlp_int8_reference.
//
// One instruction multiplies four unsigned bytes by four signed ones and adds the four products to
// an int32. Four neighbours along the dimension that a product sums over make a quad:
//
//   y  = x w^T   sums over inputs:   x in rows,  w^T in panels        (forward)
//   dx = g w     sums over outputs:  g in rows,  w in panels          (backward)
//   dw = h^T x   sums over rows:     h and x in panels of four rows   (weight_gradient)
//
// A panel holds kInt8TrainingPanel columns, quad after quad. The left operand is stored with 128 added;
// sums therefore start at -128 times the sum of the right operand's column, all of it exact.
// What is beyond the last column or row of a right operand is zero.
#pragma once

#include <cstdint>

#include "loops.h"

namespace dqrm {

constexpr int64_t kInt8TrainingPanel = 32;
// Most inputs, outputs or rows of a block: an int32 holds that many products of 255 * 128.
constexpr int64_t kInt8TrainingLongestSum = 65536;

struct Int8TrainingLayer {
  int64_t inputs;
  int64_t outputs;
  float largest_code;
  bool relu;
  const float* weight;  // [outputs, inputs]
  const float* bias;    // [outputs]
  float* weight_gradient;
  float* bias_gradient;

  // Codes of the weight: [panels of outputs][input quads][kInt8TrainingPanel][4] and
  // [panels of inputs][output quads][kInt8TrainingPanel][4].
  int8_t* forward_panels;
  int8_t* backward_panels;
  int32_t* forward_start;   // [outputs up to the end of the last panel], like the next three
  float* scale;
  float* shift;
  int32_t* backward_start;  // [inputs], likewise

  float* input_scale;       // [batch]
  int8_t* input_quads;      // [panels of inputs][panel_quads][kInt8TrainingPanel][4]
  int32_t* input_start;     // [blocks][inputs]
  uint32_t* positive;       // [batch][panels of outputs], a bit a column; only after a ReLU
  uint8_t* gradient_quads;  // [panels of outputs][panel_quads][kInt8TrainingPanel][4]
  float* gradient_scale;    // [blocks][outputs]
  float* bias_parts;        // [blocks][outputs], sums of the gradient's rows
};

// Rows that share the scales of dw, and how all rows are cut into such blocks.
struct Int8TrainingBatch {
  int64_t rows;
  int64_t block_rows;   // a multiple of 4
  int64_t panel_quads;  // row quads from one panel to the next
};

// Room for one block, of one thread. `width` is that of the widest layer, in whole panels.
struct Int8TrainingScratch {
  float* values;          // [block rows][value_stride]
  int64_t value_stride;
  uint8_t* bytes;         // [block rows][width]
  int64_t width;
  float* row_scales;      // [block rows]
  int32_t* found;         // [block rows][lanes of a vector]
  float* column_factors;  // [width]
};

struct Int8TrainingLoops {
  // Quantizes and packs one panel of outputs of the weight.
  void (*pack)(const Int8TrainingLayer& layer, int64_t panel, bool training);
  // Fills backward_start once all panels are packed.
  void (*start_backward)(const Int8TrainingLayer& layer);
  // One block through all layers, from x to y.
  void (*forward)(const Int8TrainingLayer* layers, int64_t count, MlpOutside x, MlpOutside y,
                  Int8TrainingBatch batch, int64_t block, bool training, const Int8TrainingScratch& scratch);
  // One block back through all layers, to grad_x if its values are not null. `key` is that of the
  // random bits; `first_layer` the number of layers[0] in the whole stack.
  void (*backward)(const Int8TrainingLayer* layers, int64_t count, MlpOutside grad_y, MlpOutside grad_x,
                   Int8TrainingBatch batch, int64_t block, uint64_t key, int64_t first_layer,
                   const Int8TrainingScratch& scratch);
  // One panel of outputs of the gradients of weight and bias.
  void (*weight_gradient)(const Int8TrainingLayer& layer, int64_t panel, Int8TrainingBatch batch);
};

#ifdef DQRM_X86
namespace avx512vnni {
extern const Int8TrainingLoops int8_training_loops;
}
#endif

}  // namespace dqrm
