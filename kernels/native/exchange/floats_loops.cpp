// Rows of float32, or of bfloat16 rounded to nearest, ties to even: the loops of codes without
// scales.
#include "../common/simd.h"
#include "loops.h"

namespace dqrm {
namespace DQRM_LEVEL {
namespace {

constexpr uint32_t kInfinity = 0x7F800000u;

inline uint32_t word_of(float value) {
  uint32_t word;
  __builtin_memcpy(&word, &value, sizeof word);
  return word;
}

inline float float_of(uint32_t word) {
  float value;
  __builtin_memcpy(&value, &word, sizeof value);
  return value;
}

// What arrives, as a word of float32; NaN keeps its upper bits and stays NaN.
inline uint32_t rounded(uint32_t word) {
  const bool finite = (word & 0x7FFFFFFFu) < kInfinity;
  return finite ? (word + 0x7FFFu + (word >> 16 & 1)) & 0xFFFF0000u : word & 0xFFFF0000u;
}

template <bool Half>
bool encode_row(const float* values, float* residual, bool carried, int64_t dim, uint8_t* to) {
  uint32_t largest = 0;
  for (int64_t d = 0; d < dim; ++d) {
    const float value = carried ? values[d] + residual[d] : values[d];
    const uint32_t word = Half ? rounded(word_of(value)) : word_of(value);
    const uint32_t magnitude = word & 0x7FFFFFFFu;
    largest = magnitude > largest ? magnitude : largest;
    if (residual != nullptr) residual[d] = value - float_of(word);
    if constexpr (Half) {
      const uint16_t upper = uint16_t(word >> 16);
      __builtin_memcpy(to + 2 * d, &upper, 2);
    } else {
      __builtin_memcpy(to + 4 * d, &word, 4);
    }
  }
  if (largest < kInfinity) return true;
  for (int64_t d = 0; residual != nullptr && d < dim; ++d) residual[d] = 0.0f;
  return false;
}

int64_t encode(const CodedRows& rows, const float* values, float* residual, bool carried,
               const Rounding&, int64_t begin, int64_t end) {
  const int64_t bytes = rows.dim * rows.bits / 8;
  int64_t not_finite = end;
  for (int64_t i = begin; i < end; ++i) {
    const float* from = values + i * rows.dim;
    float* own = residual != nullptr ? residual + i * rows.dim : nullptr;
    uint8_t* to = rows.codes + i * bytes;
    const bool finite = rows.bits == 16 ? encode_row<true>(from, own, carried, rows.dim, to)
                                        : encode_row<false>(from, own, carried, rows.dim, to);
    if (!finite && not_finite == end) not_finite = i;
  }
  return not_finite;
}

template <bool Half, bool Add>
void decode_row(const uint8_t* from, float alpha, int64_t dim, float* out) {
  for (int64_t d = 0; d < dim; ++d) {
    float value;
    if constexpr (Half) {
      uint16_t upper;
      __builtin_memcpy(&upper, from + 2 * d, 2);
      value = alpha * float_of(uint32_t(upper) << 16);
    } else {
      __builtin_memcpy(&value, from + 4 * d, 4);
      value = alpha * value;
    }
    out[d] = Add ? out[d] + value : value;
  }
}

void decode(const CodedRows& rows, float* out, const int64_t* targets, bool add, float alpha,
            int64_t begin, int64_t end) {
  const int64_t bytes = rows.dim * rows.bits / 8;
  for (int64_t i = begin; i < end; ++i) {
    float* to = out + (targets != nullptr ? targets[i] : i) * rows.dim;
    const uint8_t* from = rows.codes + i * bytes;
    if (rows.bits == 16) {
      add ? decode_row<true, true>(from, alpha, rows.dim, to)
          : decode_row<true, false>(from, alpha, rows.dim, to);
    } else {
      add ? decode_row<false, true>(from, alpha, rows.dim, to)
          : decode_row<false, false>(from, alpha, rows.dim, to);
    }
  }
}

}  // namespace

extern const CodeLoops float_loops{&encode, &decode};

}  // namespace DQRM_LEVEL
}  // namespace dqrm
