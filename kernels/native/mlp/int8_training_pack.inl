// Weights on their grid, as panels.
namespace dqrm {
namespace DQRM_LEVEL {
namespace {

// Codes as in dqrm/compress/grids.py, in the same arithmetic.
inline I32 grid_code(F32 weight, F32 scale, F32 largest) {
  return rounded(max(-largest - all(1.0f), min(largest, weight / scale)));
}

// m[i][j] becomes m[j][i].
inline void transpose(I32 (&m)[kLanes]) {
#pragma GCC unroll 4
  for (int d = kLanes / 2; d > 0; d /= 2) {
    I32 low, high;
    for (int j = 0; j < kLanes; ++j) {
      low[j] = j & d ? kLanes + (j ^ d) : j;
      high[j] = j & d ? kLanes + j : j | d;
    }
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) {
      if (i & d) continue;
      const I32 a = m[i], b = m[i | d];
      m[i] = __builtin_shuffle(a, b, low);
      m[i | d] = __builtin_shuffle(a, b, high);
    }
  }
}

void pack(const Int8TrainingLayer& layer, int64_t panel, bool training) {
  const int64_t first = panel * kPanel;
  const int64_t rows = smaller(kPanel, layer.outputs - first);
  const F32 largest = all(layer.largest_code);
  float scales[kPanel];
  for (int64_t i = 0; i < kPanel; ++i) {
    scales[i] = 0.0f;
    if (i < rows) {
      const float* row = layer.weight + (first + i) * layer.inputs;
      const float found = finite_or_nan(largest_magnitude(row, layer.inputs));
      scales[i] = (1e-8f > found ? 1e-8f : found) / layer.largest_code;
    }
    layer.scale[first + i] = scales[i];
    layer.shift[first + i] = i < rows ? layer.bias[first + i] : 0.0f;
  }
  const int64_t input_quads = quads_of(layer.inputs);
  const int64_t output_quads = quads_of(layer.outputs);
  int8_t* forward_panel = layer.forward_panels + panel * input_quads * kStep;
  // 64 columns at a time: as quads they are the lanes of one vector.
  constexpr int64_t kBlock = kLanes * kQuad;
  alignas(64) uint8_t bytes[kPanel][kBlock];
  for (int64_t column = 0; column < layer.inputs; column += kBlock) {
    const int64_t count = layer.inputs - column;
    for (int64_t half = 0; half < kBlock; half += kPanel) {
      for (int64_t i = 0; i < kPanel; i += kQuad) {
        Codes codes[kQuad] = {};
        for (int64_t q = 0; q < kQuad; ++q) {
          if (i + q < rows && half < count) {
            const Columns value = load_columns(
                layer.weight + (first + i + q) * layer.inputs + column + half, count - half);
            const F32 scale = all(scales[i + q]);
            codes[q] = {grid_code(value.low, scale, largest),
                        grid_code(value.high, scale, largest)};
          }
        }
        const PackedRows made = packed(codes);
        store_rows(bytes[i] + half, kBlock, made);
        if (training && i < rows && half < count) {
          store_quads(layer.backward_panels + (column + half) / kPanel * output_quads * kStep +
                          (first + i) / kQuad * kStep,
                      made);
        }
      }
    }
    for (int64_t side = 0; side < 2; ++side) {
      I32 lines[kLanes];
      for (int i = 0; i < kLanes; ++i) lines[i] = I32(_mm512_loadu_si512(bytes[side * kLanes + i]));
      transpose(lines);
      for (int64_t j = 0; j < smaller(kLanes, input_quads - column / kQuad); ++j) {
        _mm512_storeu_si512(forward_panel + (column / kQuad + j) * kStep + side * (kStep / 2),
                            __m512i(lines[j]));
      }
    }
  }
  start_of(forward_panel, input_quads, layer.forward_start + first);
}

void start_backward(const Int8TrainingLayer& layer) {
  const int64_t steps = quads_of(layer.outputs);
  for (int64_t panel = 0; panel < panels_of(layer.inputs); ++panel) {
    start_of(layer.backward_panels + panel * steps * kStep, steps,
             layer.backward_start + panel * kPanel);
  }
}

}  // namespace
}  // namespace DQRM_LEVEL
}  // namespace dqrm
