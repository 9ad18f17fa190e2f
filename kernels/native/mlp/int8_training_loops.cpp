// Linear layers with INT8 products forward and backward, for processors with AVX512-VNNI.
#include "int8_training_loops.h"

#include <immintrin.h>

#include <utility>

#include "../common/simd.h"
#include "../common/rounding.h"
#include "int8_training_multiply.inl"
#include "int8_training_quantize.inl"

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

// A [rows, columns] product of a block, in scratch.
void product(const uint8_t* bytes, int64_t width, int64_t steps, const int8_t* panels,
             const int32_t* start, int64_t columns, int64_t rows, const float* row_scale,
             const float* column_scale, const float* shift, float* out, int64_t out_row) {
  for (int64_t panel = 0; panel < panels_of(columns); ++panel) {
    const int64_t first = panel * kPanel;
    const Outputs finish{row_scale, column_scale ? column_scale + first : kOnes,
                         shift ? shift + first : kZeros, out + first, out_row};
    multiply_panel(columns - first, steps, RowBytes{bytes, width}, rows,
                   panels + panel * steps * kStep, start + first, finish);
  }
}

// A block of the layer's input as rows and as quads, each row on its own grid.
void quantize_input(const Int8TrainingLayer& layer, MlpOutside from, const Block& block, bool training,
                    const Int8TrainingScratch& scratch) {
  for (int64_t row = 0; row < block.rows; row += kQuad) {
    const int64_t count = smaller(kQuad, block.rows - row);
    F32 factors[kQuad] = {};
    for (int64_t q = 0; q < count; ++q) {
      const float* values = from.values + (row + q) * from.row_stride;
      const Scale scale = input_scale(largest_magnitude(values, layer.inputs));
      scratch.row_scales[row + q] = scale.value;
      if (training) layer.input_scale[block.begin + row + q] = scale.value;
      factors[q] = all(scale.reciprocal);
    }
    for (int64_t panel = 0; panel < panels_of(layer.inputs); ++panel) {
      const int64_t first = panel * kPanel;
      Codes codes[kQuad] = {};
      for (int64_t q = 0; q < count; ++q) {
        const Columns value = scaled(
            load_columns(from.values + (row + q) * from.row_stride + first, layer.inputs - first),
            factors[q]);
        codes[q] = {rounded(value.low), rounded(value.high)};
        store_bytes(scratch.bytes + (row + q) * scratch.width + first, with_128(codes[q]));
      }
      if (training) {
        const int64_t quad = panel * block.panel_quads + block.first_quad + row / kQuad;
        store_quads(layer.input_quads + quad * kStep, codes);
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

// Puts zero where `value` is not above zero; a NaN stays. Returns what stayed, a bit a column.
inline uint32_t rectify(Columns* value) {
  const __mmask16 low = _mm512_cmp_ps_mask(__m512(value->low), __m512{}, _CMP_NLE_UQ);
  const __mmask16 high = _mm512_cmp_ps_mask(__m512(value->high), __m512{}, _CMP_NLE_UQ);
  *value = {F32(_mm512_maskz_mov_ps(low, __m512(value->low))),
            F32(_mm512_maskz_mov_ps(high, __m512(value->high)))};
  return uint32_t(low) | uint32_t(high) << 16;
}

// The ReLU of a block, in place, and to y if y.values is not null.
void activate(const Int8TrainingLayer& layer, const Block& block, bool training, float* values,
              int64_t stride, MlpOutside y) {
  const int64_t panels = panels_of(layer.outputs);
  for (int64_t row = 0; row < block.rows; ++row) {
    for (int64_t panel = 0; panel < panels; ++panel) {
      float* at = values + row * stride + panel * kPanel;
      Columns value = load_columns(at, kPanel);
      if (layer.relu) {
        const uint32_t bits = rectify(&value);
        if (training) layer.positive[(block.begin + row) * panels + panel] = bits;
        store_columns(at, value, kPanel);
      }
      if (y.values) {
        store_columns(y.values + (block.begin + row) * y.row_stride + panel * kPanel, value,
                      layer.outputs - panel * kPanel);
      }
    }
  }
}

void forward(const Int8TrainingLayer* layers, int64_t count, MlpOutside x, MlpOutside y,
             Int8TrainingBatch batch, int64_t number, bool training, const Int8TrainingScratch& scratch) {
  const Block block = block_of(batch, number);
  MlpOutside from{x.values + block.begin * x.row_stride, x.row_stride};
  float* out = scratch.values[0];
  for (int64_t i = 0; i < count; ++i) {
    const Int8TrainingLayer& layer = layers[i];
    const bool last = i + 1 == count;
    quantize_input(layer, from, block, training, scratch);
    product(scratch.bytes, scratch.width, quads_of(layer.inputs), layer.forward_panels,
            layer.forward_start, layer.outputs, block.rows, scratch.row_scales, layer.scale,
            layer.shift, out, scratch.value_stride);
    if (layer.relu || last) {
      activate(layer, block, training, out, scratch.value_stride, last ? y : MlpOutside{});
    }
    from = {out, scratch.value_stride};
  }
}

// A block of a gradient of the layer's output, zero where the ReLU gave zero, from `from` to `to`.
void mask_gradient(const Int8TrainingLayer& layer, const Block& block, MlpOutside from, float* to,
                   int64_t stride) {
  const int64_t panels = panels_of(layer.outputs);
  for (int64_t row = 0; row < block.rows; ++row) {
    const uint32_t* positive = layer.positive + (block.begin + row) * panels;
    for (int64_t panel = 0; panel < panels; ++panel) {
      Columns value = load_columns(from.values + row * from.row_stride + panel * kPanel,
                                   layer.outputs - panel * kPanel);
      if (layer.relu) {
        const uint32_t bits = positive[panel];
        value = {F32(_mm512_maskz_mov_ps(__mmask16(bits), __m512(value.low))),
                 F32(_mm512_maskz_mov_ps(__mmask16(bits >> 16), __m512(value.high)))};
      }
      store_columns(to + row * stride + panel * kPanel, value, kPanel);
    }
  }
}

// The upper half of the row number tells apart what is rounded in a step.
inline int64_t stream(int64_t layer, int64_t operand) { return (2 * layer + operand) << 32; }

// The left operand of dx: every row times the weights' scales, on its own grid.
void quantize_rows(const Int8TrainingLayer& layer, const Block& block, const float* gradient,
                   uint64_t key, int64_t layer_number, const Int8TrainingScratch& scratch) {
  const int64_t panels = panels_of(layer.outputs);
  const auto weighted = [&](const float* row, int64_t panel) -> Columns {
    const Columns value = load_columns(row + panel * kPanel, kPanel);
    const Columns scale = load_columns(layer.scale + panel * kPanel, kPanel);
    return {value.low * scale.low, value.high * scale.high};
  };
  for (int64_t i = 0; i < block.rows; ++i) {
    const float* row = gradient + i * scratch.value_stride;
    I32 found{};
    for (int64_t panel = 0; panel < panels; ++panel) {
      const Columns value = weighted(row, panel);
      found = larger(found, larger(magnitude(value.low), magnitude(value.high)));
    }
    const Scale scale = gradient_scale(largest_of(found));
    scratch.row_scales[i] = scale.value;
    const F32 factor = all(scale.reciprocal);
    const uint32_t bits_key = row_key(key, stream(layer_number, 0) + block.begin + i);
    for (int64_t panel = 0; panel < panels; ++panel) {
      const U32 bits = random_lanes(bits_key, uint32_t(panel * kLanes));
      const Codes codes = rounded(scaled(weighted(row, panel), factor), bits);
      store_bytes(scratch.bytes + i * scratch.width + panel * kPanel, with_128(codes));
    }
  }
}

// The left operand of dw: every column times the rows' scales, on its own grid; and db.
void quantize_columns(const Int8TrainingLayer& layer, const Block& block, const float* gradient,
                      uint64_t key, int64_t layer_number, const Int8TrainingScratch& scratch) {
  const int64_t panels = panels_of(layer.outputs);
  uint32_t* keys = reinterpret_cast<uint32_t*>(scratch.row_scales);
  for (int64_t i = 0; i < block.rows; ++i) {
    keys[i] = row_key(key, stream(layer_number, 1) + block.begin + i);
  }
  const float* row_scales = layer.input_scale + block.begin;
  for (int64_t panel = 0; panel < panels; ++panel) {
    const int64_t place = (block.number * panels + panel) * kPanel;
    const float* column = gradient + panel * kPanel;
    I32 low{}, high{};
    Columns sum{};
    for (int64_t i = 0; i < block.rows; ++i) {
      const Columns value = load_columns(column + i * scratch.value_stride, kPanel);
      sum = {sum.low + value.low, sum.high + value.high};
      const Columns weighted = scaled(value, all(row_scales[i]));
      low = larger(low, magnitude(weighted.low));
      high = larger(high, magnitude(weighted.high));
    }
    store_columns(layer.bias_parts + place, sum, kPanel);
    alignas(64) float reciprocals[kPanel];
    for (int lane = 0; lane < kPanel; ++lane) {
      const Scale scale = gradient_scale(lane < kLanes ? low[lane] : high[lane - kLanes]);
      layer.gradient_scale[place + lane] = scale.value;
      reciprocals[lane] = scale.reciprocal;
    }
    const Columns factor = load_columns(reciprocals, kPanel);
    uint8_t* to = layer.gradient_quads + (panel * block.panel_quads + block.first_quad) * kStep;
    for (int64_t i = 0; i < block.rows; i += kQuad, to += kStep) {
      Codes codes[kQuad] = {};
      for (int64_t q = 0; q < smaller(kQuad, block.rows - i); ++q) {
        const Columns value =
            scaled(load_columns(column + (i + q) * scratch.value_stride, kPanel),
                   all(row_scales[i + q]));
        const U32 bits = random_lanes(keys[i + q], uint32_t(panel * kLanes));
        codes[q] = with_128(
            rounded(Columns{value.low * factor.low, value.high * factor.high}, bits));
      }
      store_quads(to, codes);
    }
  }
}

void backward(const Int8TrainingLayer* layers, int64_t count, MlpOutside grad_y, MlpOutside grad_x,
              Int8TrainingBatch batch, int64_t number, uint64_t key, int64_t first_layer,
              const Int8TrainingScratch& scratch) {
  const Block block = block_of(batch, number);
  const int64_t stride = scratch.value_stride;
  float* gradient = scratch.values[0];
  float* below = scratch.values[1];
  mask_gradient(layers[count - 1], block,
                {grad_y.values + block.begin * grad_y.row_stride, grad_y.row_stride}, gradient,
                stride);
  for (int64_t i = count; i-- > 0;) {
    const Int8TrainingLayer& layer = layers[i];
    if (i > 0 || grad_x.values) {
      quantize_rows(layer, block, gradient, key, first_layer + i, scratch);
      product(scratch.bytes, scratch.width, quads_of(layer.outputs), layer.backward_panels,
              layer.backward_start, layer.inputs, block.rows, scratch.row_scales, nullptr, nullptr,
              below, stride);
    }
    quantize_columns(layer, block, gradient, key, first_layer + i, scratch);
    if (i > 0) {
      mask_gradient(layers[i - 1], block, {below, stride}, below, stride);
      std::swap(gradient, below);
    }
  }
  if (!grad_x.values) return;
  for (int64_t row = 0; row < block.rows; ++row) {
    for (int64_t first = 0; first < layers->inputs; first += kPanel) {
      store_columns(grad_x.values + (block.begin + row) * grad_x.row_stride + first,
                    load_columns(below + row * stride + first, kPanel), layers->inputs - first);
    }
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

extern const Int8TrainingLoops int8_training_loops = {pack, start_backward, forward, backward, weight_gradient};

}  // namespace DQRM_LEVEL
}  // namespace dqrm
