// Weights on their grid, as operands.
namespace dqrm {
namespace DQRM_LEVEL {
namespace {

// The largest magnitude of a row, a NaN if it has one: as integers, magnitudes are in order and
// NaN come last.
float largest_magnitude(const float* row, int64_t count) {
  I32 found[4] = {};
  for (int64_t k = 0; k < count; k += 4 * kLanes) {
    for (int i = 0; i < 4; ++i) {
      const I32 value = I32(abs(load_part(row + k + i * kLanes, count - k - i * kLanes)));
      found[i] = value > found[i] ? value : found[i];
    }
  }
  int32_t largest = 0;
  for (const I32& lanes : found) {
    for (int lane = 0; lane < kLanes; ++lane) {
      if (lanes[lane] > largest) largest = lanes[lane];
    }
  }
  float value;
  __builtin_memcpy(&value, &largest, sizeof value);
  return value;
}

// Codes as in dqrm/compress/grids.py, in the same arithmetic.
inline F32 quantized(F32 weight, F32 scale, F32 largest) {
  const F32 code = round_half_even(weight / scale);
  return min(largest, max(-largest - all(1.0f), code)) + F32{};
}

inline float scale_of(float largest_magnitude, float largest_code) {
  return (1e-8f > largest_magnitude ? 1e-8f : largest_magnitude) / largest_code;
}

// Exchanges the blocks of D x D off the diagonal of every 2D x 2D block.
template <int D>
inline void exchange(U32 (&m)[kLanes]) {
  I32 low{}, high{};
  for (int j = 0; j < kLanes; ++j) {
    low[j] = j & D ? kLanes + (j ^ D) : j;
    high[j] = j & D ? kLanes + j : j | D;
  }
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) {
    if (i & D) continue;
    const U32 a = m[i], b = m[i | D];
    m[i] = __builtin_shuffle(a, b, low);
    m[i | D] = __builtin_shuffle(a, b, high);
  }
}

// m[i][j] becomes m[j][i].
inline void transpose(U32 (&m)[kLanes]) {
  if constexpr (kLanes > 8) exchange<8>(m);
  if constexpr (kLanes > 4) exchange<4>(m);
  exchange<2>(m);
  exchange<1>(m);
}

void pack(const MlpLayer& layer, int64_t block, bool training) {
  const int64_t first = block * kLanes;
  const int64_t rows = smaller(kLanes, layer.outputs - first);
  const bool quantize = layer.largest_code != 0.0f;
  const F32 largest = all(layer.largest_code);
  // Codes are exact in bfloat16, and so are their products with integers in FP32: there the
  // product takes them as they are. Otherwise it takes scale * code.
  const bool forward_codes = kUnit == 2 || layer.integer_input;
  float scales[kLanes];
  for (int64_t i = 0; i < kLanes; ++i) {
    scales[i] = 1.0f;
    if (quantize && i < rows) {
      const float* row = layer.weight + (first + i) * layer.inputs;
      scales[i] = scale_of(largest_magnitude(row, layer.inputs), layer.largest_code);
    }
    layer.scale[first + i] = forward_codes ? scales[i] : 1.0f;
    layer.shift[first + i] = i < rows ? layer.bias[first + i] : 0.0f;
  }
  const int64_t input_units = units_of(layer.inputs);
  const int64_t output_units = units_of(layer.outputs);
  uint32_t* forward_panel =
      layer.forward_panels + first / kPanel * input_units * kPanel + first % kPanel;
  for (int64_t column = 0; column < layer.inputs; column += kLanes * kUnit) {
    U32 units[kLanes];
    const int64_t count = layer.inputs - column;
    Columns even{};
    for (int64_t i = 0; i < kLanes; ++i) {
      Columns value{};
      F32 down{};  // what backward multiplies with, if that is not a pair of rows of value
      if (i < rows) {
        const float* from = layer.weight + (first + i) * layer.inputs + column;
        value.low = down = load_part(from, count);
        if constexpr (kUnit == 2) value.high = load_part(from + kLanes, count - kLanes);
        if (quantize) {
          const F32 scale = all(scales[i]);
          value.low = quantized(value.low, scale, largest);
          if constexpr (kUnit == 2) {
            value.high = quantized(value.high, scale, largest);
          } else {
            down = scale * value.low;
            if (!forward_codes) value.low = down;
          }
        }
      }
      units[i] = columns_unit(value.low, value.high);
      if (!training) continue;
      uint32_t* to = layer.backward_panels + column / kPanel * output_units * kPanel +
                     (first + i) / kUnit * kPanel + column % kPanel;
      if constexpr (kUnit == 1) {
        if (i < rows) store_vector(to, U32(down));
      } else if (i % 2 == 0) {
        even = value;
      } else if (i - 1 < rows) {
        pair_rows(even, value, to);
      }
    }
    transpose(units);
    for (int64_t j = 0; j < smaller(kLanes, input_units - column / kUnit); ++j) {
      store_vector(forward_panel + (column / kUnit + j) * kPanel, units[j]);
    }
  }
}

}  // namespace
}  // namespace DQRM_LEVEL
}  // namespace dqrm
