// Linear layers with INT8 products forward and backward, for processors with AVX512-VNNI.
#include "int8_training_loops.h"

#include <immintrin.h>

#include <utility>

#include "../common/simd.h"
#include "../common/rounding.h"
#include "int8_training_multiply.inl"
#include "int8_training_quantize.inl"
// After what they are made of.
#include "int8_training_finish.inl"
#include "int8_training_pack.inl"

namespace dqrm {
namespace DQRM_LEVEL {
namespace {

// The rows of a block.
struct Block {
  int64_t number;
  int64_t begin;
  int64_t rows;
  int64_t first_quad;
  int64_t panel_quads;
};

inline Block block_of(Int8TrainingBatch batch, int64_t number) {
  const int64_t begin = number * batch.block_rows;
  return {number, begin, smaller(batch.block_rows, batch.rows - begin), begin / kQuad,
          batch.panel_quads};
}

// Products of the block's codes with all panels; finish_of(panel) finishes one of them.
template <typename FinishOf>
void product(const Int8TrainingScratch& scratch, int64_t steps, const int8_t* panels,
             const int32_t* start, int64_t columns, int64_t rows, FinishOf finish_of) {
  for (int64_t panel = 0; panel < panels_of(columns); ++panel) {
    const int64_t first = panel * kPanel;
    multiply_panel(columns - first, steps, RowBytes{scratch.bytes, scratch.width}, rows,
                   panels + panel * steps * kStep, start + first, finish_of(panel));
  }
}

void forget_found(const Int8TrainingScratch& scratch, int64_t rows) {
  __builtin_memset(scratch.found, 0, size_t(rows * kLanes) * sizeof(int32_t));
}

int32_t found_in(const Int8TrainingScratch& scratch, int64_t row) {
  return largest_of(I32(_mm512_loadu_si512(scratch.found + row * kLanes)));
}

// A block of the layer's input as rows and as quads, each row on its own grid. Its largest
// magnitudes are in scratch.found unless it comes from outside.
void quantize_input(const Int8TrainingLayer& layer, MlpOutside from, bool outside,
                    const Block& block, bool training, const Int8TrainingScratch& scratch) {
  for (int64_t row = 0; row < block.rows; row += kQuad) {
    const int64_t count = smaller(kQuad, block.rows - row);
    const float* values = from.values + row * from.row_stride;
    F32 factors[kQuad] = {};
    for (int64_t q = 0; q < count; ++q) {
      const int32_t largest = outside
                                  ? largest_magnitude(values + q * from.row_stride, layer.inputs)
                                  : found_in(scratch, row + q);
      const Scale scale = input_scale(largest);
      scratch.row_scales[row + q] = scale.value;
      if (training) layer.input_scale[block.begin + row + q] = scale.value;
      factors[q] = all(scale.reciprocal);
    }
    for (int64_t panel = 0; panel < panels_of(layer.inputs); ++panel) {
      const int64_t first = panel * kPanel;
      const __mmask16 low = lanes(layer.inputs - first);
      const __mmask16 high = lanes(layer.inputs - first - kLanes);
      Codes codes[kQuad];
#pragma GCC unroll 4
      for (int64_t q = 0; q < kQuad; ++q) {
        // Zero behind the last row, without reading it.
        const float* at = values + q * from.row_stride + first;
        const __mmask16 used = q < count ? 0xFFFF : 0;
        const Columns value = scaled(load_columns(at, low & used, high & used), factors[q]);
        codes[q] = {rounded(value.low), rounded(value.high)};
      }
      const PackedRows made = packed(codes);
      store_rows(scratch.bytes + row * scratch.width + first, scratch.width, with_128(made));
      if (training) {
        const int64_t quad = panel * block.panel_quads + block.first_quad + row / kQuad;
        store_quads(layer.input_quads + quad * kStep, made);
      }
    }
  }
  if (!training) return;
  for (int64_t panel = 0; panel < panels_of(layer.inputs); ++panel) {
    start_of(layer.input_quads + (panel * block.panel_quads + block.first_quad) * kStep,
             quads_of(block.rows),
             layer.input_start + (block.number * panels_of(layer.inputs) + panel) * kPanel);
  }
}

void forward(const Int8TrainingLayer* layers, int64_t count, MlpOutside x, MlpOutside y,
             Int8TrainingBatch batch, int64_t number, bool training,
             const Int8TrainingScratch& scratch) {
  const Block block = block_of(batch, number);
  MlpOutside from{x.values + block.begin * x.row_stride, x.row_stride};
  for (int64_t i = 0; i < count; ++i) {
    const Int8TrainingLayer& layer = layers[i];
    const bool last = i + 1 == count;
    quantize_input(layer, from, i == 0, block, training, scratch);
    forget_found(scratch, block.rows);
    const MlpOutside to =
        last ? MlpOutside{y.values + block.begin * y.row_stride, y.row_stride}
             : MlpOutside{scratch.values, scratch.value_stride};
    const int64_t panels = panels_of(layer.outputs);
    uint32_t* positive =
        training && layer.relu ? layer.positive + block.begin * panels : nullptr;
    product(scratch, quads_of(layer.inputs), layer.forward_panels, layer.forward_start,
            layer.outputs, block.rows, [&](int64_t panel) {
              const int64_t first = panel * kPanel;
              return Outputs{scratch.row_scales,
                             layer.scale + first,
                             layer.shift + first,
                             layer.relu ? 0.0f : -__builtin_inff(),
                             positive ? positive + panel : nullptr,
                             panels,
                             scratch.found,
                             {to.values + first, to.row_stride, layer.outputs - first}};
            });
    from = to;
  }
}

// The gradient's panel of a block.
Gradients gradients_of(const Int8TrainingLayer& layer, const Block& block, int64_t panel, float* to,
                       const Int8TrainingScratch& scratch) {
  static constexpr uint32_t kAll = ~uint32_t(0);
  const int64_t panels = panels_of(layer.outputs), first = panel * kPanel;
  const int64_t place = (block.number * panels + panel) * kPanel;
  return {layer.relu ? layer.positive + block.begin * panels + panel : &kAll,
          layer.relu ? panels : 0,
          layer.scale + first,
          layer.input_scale + block.begin,
          scratch.found,
          to + first,
          scratch.value_stride,
          layer.bias_parts + place,
          layer.gradient_scale + place,
          scratch.column_factors + first};
}

// The gradient that the caller has of the last layer's output.
void take_gradient(const Int8TrainingLayer& layer, const Block& block, MlpOutside from, float* to,
                   const Int8TrainingScratch& scratch) {
  for (int64_t panel = 0; panel < panels_of(layer.outputs); ++panel) {
    const int64_t first = panel * kPanel;
    Gradients gradients = gradients_of(layer, block, panel, to, scratch);
    for (int64_t row = 0; row < block.rows; ++row) {
      const float* at = from.values + (block.begin + row) * from.row_stride + first;
      // Lines so far apart are not what the processor foresees.
      __builtin_prefetch(at + kPanel);
      __builtin_prefetch(at + kPanel + kLanes);
      gradients.take(row, load_columns(at, layer.outputs - first));
    }
    gradients.close();
  }
}

// The left operands of dx, every row times the weights' scales on its own grid, if anybody wants
// it, and of dw, every column times the rows' scales on its own grid.
template <bool kRows>
void quantize_gradient(const Int8TrainingLayer& layer, const Block& block, const float* gradient,
                       uint64_t key, int64_t layer_number, const Int8TrainingScratch& scratch) {
  for (int64_t row = 0; row < block.rows; row += kQuad) {
    const float* values[kQuad];
    uint32_t keys[kQuad];
    F32 row_factors[kQuad], input_scales[kQuad];
    for (int64_t q = 0; q < kQuad; ++q) {
      // Behind the last row, that row again; nobody will see it.
      const int64_t at = smaller(row + q, block.rows - 1);
      values[q] = gradient + at * scratch.value_stride;
      if constexpr (kRows) {
        const Scale scale = gradient_scale(found_in(scratch, at));
        scratch.row_scales[at] = scale.value;
        row_factors[q] = all(scale.reciprocal);
      }
      input_scales[q] = all(layer.input_scale[block.begin + at]);
      // The upper half tells apart the layers of a step.
      keys[q] = row_key(key, (layer_number << 32) + block.begin + at);
    }
    for (int64_t panel = 0; panel < panels_of(layer.outputs); ++panel) {
      const int64_t first = panel * kPanel;
      const uint32_t element = uint32_t(panel * kLanes);
      const Columns weight_scale = load_columns(layer.scale + first, kPanel);
      const Columns column_factor = load_columns(scratch.column_factors + first, kPanel);
      Codes rows[kQuad], columns[kQuad];
#pragma GCC unroll 4
      for (int64_t q = 0; q < kQuad; ++q) {
        const Columns value = load_columns(values[q] + first, kPanel);
        const Columns chance = chances(random_lanes(keys[q], element));
        if constexpr (kRows) {
          rows[q] = rounded(scaled(scaled(value, weight_scale), row_factors[q]), chance);
        }
        columns[q] = rounded(scaled(scaled(value, input_scales[q]), column_factor), chance);
      }
      if constexpr (kRows) {
        store_rows(scratch.bytes + row * scratch.width + first, scratch.width,
                   with_128(packed(rows)));
      }
      const int64_t quad = panel * block.panel_quads + block.first_quad + row / kQuad;
      store_quads(layer.gradient_quads + quad * kStep, with_128(packed(columns)));
    }
  }
}

void backward(const Int8TrainingLayer* layers, int64_t count, MlpOutside grad_y, MlpOutside grad_x,
              Int8TrainingBatch batch, int64_t number, uint64_t key, int64_t first_layer,
              const Int8TrainingScratch& scratch) {
  const Block block = block_of(batch, number);
  float* gradient = scratch.values;
  forget_found(scratch, block.rows);
  take_gradient(layers[count - 1], block, grad_y, gradient, scratch);
  for (int64_t i = count; i-- > 0;) {
    const Int8TrainingLayer& layer = layers[i];
    const auto below = [&](auto finish_of) {
      product(scratch, quads_of(layer.outputs), layer.backward_panels, layer.backward_start,
              layer.inputs, block.rows, finish_of);
    };
    if (i == 0 && !grad_x.values) {
      quantize_gradient<false>(layer, block, gradient, key, first_layer + i, scratch);
      return;
    }
    quantize_gradient<true>(layer, block, gradient, key, first_layer + i, scratch);
    if (i == 0) {
      float* to = grad_x.values + block.begin * grad_x.row_stride;
      below([&](int64_t panel) {
        const int64_t first = panel * kPanel;
        return GradientsOutside{scratch.row_scales,
                                {to + first, grad_x.row_stride, layer.inputs - first}};
      });
      return;
    }
    forget_found(scratch, block.rows);
    below([&](int64_t panel) {
      return GradientsBelow{scratch.row_scales,
                            gradients_of(layers[i - 1], block, panel, gradient, scratch)};
    });
  }
}

void weight_gradient(const Int8TrainingLayer& layer, int64_t panel, Int8TrainingBatch batch) {
  alignas(64) float tile[kPanel * kPanel] = {};
  const int64_t first = panel * kPanel;
  const int64_t outputs = smaller(kPanel, layer.outputs - first);
  const int64_t blocks = (batch.rows + batch.block_rows - 1) / batch.block_rows;
  const int64_t width = panels_of(layer.outputs) * kPanel;
  for (int64_t q = 0; q < panels_of(layer.inputs); ++q) {
    const int64_t columns = layer.inputs - q * kPanel;
    const auto add = [&](int64_t number, const auto& finish) {
      const Block block = block_of(batch, number);
      const uint8_t* left =
          layer.gradient_quads + (panel * batch.panel_quads + block.first_quad) * kStep;
      const int8_t* right = layer.input_quads + (q * batch.panel_quads + block.first_quad) * kStep;
      multiply_panel(columns, quads_of(block.rows), ColumnBytes{left}, outputs, right,
                     layer.input_start + (number * panels_of(layer.inputs) + q) * kPanel, finish);
    };
    // The sums so far stay in the nearest cache, like the operands of a block.
    const float* scales = layer.gradient_scale + first;
    if (blocks > 0) add(0, Sums<true>{scales, tile});
    for (int64_t number = 1; number < blocks; ++number) {
      add(number, Sums<false>{scales + number * width, tile});
    }
    for (int64_t i = 0; i < outputs; ++i) {
      store_columns(layer.weight_gradient + (first + i) * layer.inputs + q * kPanel,
                    load_columns(tile + i * kPanel, kPanel), columns);
    }
  }
  for (int64_t n = first; n < first + outputs; ++n) {
    float sum = 0.0f;
    for (int64_t number = 0; number < blocks; ++number) sum += layer.bias_parts[number * width + n];
    layer.bias_gradient[n] = sum;
  }
}

}  // namespace

extern const Int8TrainingLoops int8_training_loops = {pack, start_backward, forward, backward,
                                                      weight_gradient};

}  // namespace DQRM_LEVEL
}  // namespace dqrm
