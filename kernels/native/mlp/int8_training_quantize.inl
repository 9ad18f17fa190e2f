// Values to codes: weights on their grid, rows and columns of a batch on theirs.
namespace dqrm {
namespace DQRM_LEVEL {
namespace {

// A panel's columns of one row.
struct Columns {
  F32 low;
  F32 high;
};
struct Codes {
  I32 low;
  I32 high;
};

inline __mmask16 lanes(int64_t count) {
  return count >= kLanes ? 0xFFFF : count > 0 ? __mmask16((1u << count) - 1) : 0;
}

// The first `count` columns, zero in the others.
inline Columns load_columns(const float* from, int64_t count) {
  return {F32(_mm512_maskz_loadu_ps(lanes(count), from)),
          F32(_mm512_maskz_loadu_ps(lanes(count - kLanes), from + kLanes))};
}

inline void store_columns(float* to, Columns value, int64_t count) {
  _mm512_mask_storeu_ps(to, lanes(count), __m512(value.low));
  _mm512_mask_storeu_ps(to + kLanes, lanes(count - kLanes), __m512(value.high));
}

// Magnitudes as integers keep their order, and a NaN is larger than any number.
inline I32 magnitude(F32 value) { return I32(value) & 0x7FFFFFFF; }
inline I32 larger(I32 a, I32 b) { return I32(_mm512_max_epi32(__m512i(a), __m512i(b))); }
inline int32_t largest_of(I32 magnitudes) { return _mm512_reduce_max_epi32(__m512i(magnitudes)); }

// A magnitude as a float; NaN for infinity too, which no grid can hold.
inline float finite_or_nan(int32_t bits) {
  if (bits >= 0x7F800000) return __builtin_nanf("");
  float value;
  __builtin_memcpy(&value, &bits, sizeof value);
  return value;
}

// Below this a scale has no reciprocal to speak of; what it would hold is taken for zero.
constexpr float kSmallestScale = 1e-30f;

struct Scale {
  float value;
  float reciprocal;
};

inline Scale input_scale(int32_t largest) {
  const float found = finite_or_nan(largest);
  const float scale = (1e-8f > found ? 1e-8f : found) / 127.0f;
  return {scale, 1.0f / scale};
}

inline Scale gradient_scale(int32_t largest) {
  const float scale = finite_or_nan(largest) / 127.0f;
  if (scale < kSmallestScale) return {0.0f, 0.0f};
  return {scale, 1.0f / scale};
}

// Ties to even; what is not a number becomes some code.
inline I32 rounded(F32 value) { return I32(_mm512_cvtps_epi32(__m512(value))); }

// Down or up, by 16 random bits.
inline I32 rounded(F32 value, U32 bits) {
  const F32 chance = fma(to_float(I32(bits)), all(0x1p-16f), all(0x1p-17f));
  const __m512i floor = _mm512_cvt_roundps_epi32(
      __m512(value + chance), _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  return I32(_mm512_min_epi32(floor, _mm512_set1_epi32(127)));
}

inline Codes rounded(Columns value, U32 bits) {
  return {rounded(value.low, bits & 0xFFFFu), rounded(value.high, bits >> 16)};
}

inline void store_bytes(void* to, Codes codes) {
  _mm_storeu_si128(static_cast<__m128i*>(to), _mm512_cvtepi32_epi8(__m512i(codes.low)));
  _mm_storeu_si128(static_cast<__m128i*>(to) + 1, _mm512_cvtepi32_epi8(__m512i(codes.high)));
}

// Codes with 128 added are codes whose highest bit is flipped.
inline Codes with_128(Codes codes) { return {codes.low ^ 0x80, codes.high ^ 0x80}; }

inline I32 quads(I32 a, I32 b, I32 c, I32 d) {
  return (a & 255) | ((b & 255) << 8) | ((c & 255) << 16) | (d << 24);
}

// Four rows of a panel as one quad.
inline void store_quads(void* to, const Codes (&rows)[kQuad]) {
  const I32 low = quads(rows[0].low, rows[1].low, rows[2].low, rows[3].low);
  const I32 high = quads(rows[0].high, rows[1].high, rows[2].high, rows[3].high);
  _mm512_storeu_si512(to, __m512i(low));
  _mm512_storeu_si512(static_cast<char*>(to) + kStep / 2, __m512i(high));
}

inline Columns scaled(Columns value, F32 factor) {
  return {value.low * factor, value.high * factor};
}

inline int32_t largest_magnitude(const float* row, int64_t count) {
  I32 found{};
  for (int64_t k = 0; k < count; k += kPanel) {
    const Columns value = load_columns(row + k, count - k);
    found = larger(found, larger(magnitude(value.low), magnitude(value.high)));
  }
  return largest_of(found);
}

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
  alignas(64) int8_t bytes[kPanel][kBlock];
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
          store_bytes(bytes[i + q] + half, codes[q]);
        }
        if (training && i < rows && half < count) {
          store_quads(layer.backward_panels + (column + half) / kPanel * output_quads * kStep +
                          (first + i) / kQuad * kStep,
                      codes);
        }
      }
    }
    for (int64_t side = 0; side < 2; ++side) {
      I32 lines[kLanes];
      for (int i = 0; i < kLanes; ++i) lines[i] = load_quads(bytes[side * kLanes + i]);
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
