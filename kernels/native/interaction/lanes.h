// Vectors of any width, for dimensions that do not fill a register.
//
// For files named *_loops.cpp only; see common/level.h.
#pragma once

#include "../common/simd.h"

namespace dqrm {
namespace DQRM_LEVEL {
namespace {

// Calls function(0) to function(Count - 1), unrolled early enough for arrays of vectors that are
// indexed by the argument to stay in registers.
template <int Count, int From = 0, typename Function>
[[gnu::always_inline]] inline void unrolled(const Function& function) {
  if constexpr (From < Count) {
    function(From);
    unrolled<Count, From + 1>(function);
  }
}

template <int Width>
struct Lanes {
  typedef float Vector __attribute__((vector_size(4 * Width)));
};

template <>
struct Lanes<1> {
  typedef float Vector;
};

template <int Width>
using Vector = typename Lanes<Width>::Vector;

template <int Width>
inline Vector<Width> load(const float* from) {
  Vector<Width> value;
  __builtin_memcpy(&value, from, sizeof value);
  return value;
}

template <int Width>
inline void store(float* to, Vector<Width> value) {
  __builtin_memcpy(to, &value, sizeof value);
}

// factor * values + sum.
template <int Width>
inline Vector<Width> scaled_sum(float factor, Vector<Width> values, Vector<Width> sum) {
#ifdef __AVX512F__
  if constexpr (Width == 16) {
    return Vector<16>(_mm512_fmadd_ps(_mm512_set1_ps(factor), __m512(values), __m512(sum)));
  }
#endif
#ifdef __AVX2__
  if constexpr (Width == 8) {
    return Vector<8>(_mm256_fmadd_ps(_mm256_set1_ps(factor), __m256(values), __m256(sum)));
  } else if constexpr (Width == 4) {
    return Vector<4>(_mm_fmadd_ps(_mm_set1_ps(factor), __m128(values), __m128(sum)));
  }
#endif
  return factor * values + sum;
}

// Copies 0 <= count < 16 floats; a loop would become a call, or worse, a `rep movs`.
inline void copy_few(float* to, const float* from, int64_t count) {
  if ((count & 8) != 0) {
    __builtin_memcpy(to, from, 32);
    to += 8;
    from += 8;
  }
  if ((count & 4) != 0) {
    __builtin_memcpy(to, from, 16);
    to += 4;
    from += 4;
  }
  if ((count & 2) != 0) {
    __builtin_memcpy(to, from, 8);
    to += 2;
    from += 2;
  }
  if ((count & 1) != 0) *to = *from;
}

// Transposes a block of Width rows and four columns: to[c * to_stride + r] = from[r * stride + c].
// Every four lanes of a register hold a 4 x 4 matrix.
template <int Width>
inline void transpose_block(const float* from, int64_t stride, float* to, int64_t to_stride) {
#ifdef __AVX512F__
  if constexpr (Width == 16) {
    const auto quads = [&](const float* row) {
      const __m512 two = _mm512_insertf32x4(_mm512_castps128_ps512(_mm_loadu_ps(row)),
                                            _mm_loadu_ps(row + 4 * stride), 1);
      return _mm512_insertf32x4(_mm512_insertf32x4(two, _mm_loadu_ps(row + 8 * stride), 2),
                                _mm_loadu_ps(row + 12 * stride), 3);
    };
    const __m512 a = quads(from), b = quads(from + stride);
    const __m512 c = quads(from + 2 * stride), d = quads(from + 3 * stride);
    const __m512d ab_low = _mm512_castps_pd(_mm512_unpacklo_ps(a, b));
    const __m512d ab_high = _mm512_castps_pd(_mm512_unpackhi_ps(a, b));
    const __m512d cd_low = _mm512_castps_pd(_mm512_unpacklo_ps(c, d));
    const __m512d cd_high = _mm512_castps_pd(_mm512_unpackhi_ps(c, d));
    store<16>(to, F32(_mm512_unpacklo_pd(ab_low, cd_low)));
    store<16>(to + to_stride, F32(_mm512_unpackhi_pd(ab_low, cd_low)));
    store<16>(to + 2 * to_stride, F32(_mm512_unpacklo_pd(ab_high, cd_high)));
    store<16>(to + 3 * to_stride, F32(_mm512_unpackhi_pd(ab_high, cd_high)));
    return;
  }
#endif
#ifdef __AVX2__
  if constexpr (Width == 8) {
    const auto quads = [&](const float* row) {
      return _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(row)),
                                  _mm_loadu_ps(row + 4 * stride), 1);
    };
    const __m256 a = quads(from), b = quads(from + stride);
    const __m256 c = quads(from + 2 * stride), d = quads(from + 3 * stride);
    const __m256d ab_low = _mm256_castps_pd(_mm256_unpacklo_ps(a, b));
    const __m256d ab_high = _mm256_castps_pd(_mm256_unpackhi_ps(a, b));
    const __m256d cd_low = _mm256_castps_pd(_mm256_unpacklo_ps(c, d));
    const __m256d cd_high = _mm256_castps_pd(_mm256_unpackhi_ps(c, d));
    store<8>(to, Vector<8>(_mm256_unpacklo_pd(ab_low, cd_low)));
    store<8>(to + to_stride, Vector<8>(_mm256_unpackhi_pd(ab_low, cd_low)));
    store<8>(to + 2 * to_stride, Vector<8>(_mm256_unpacklo_pd(ab_high, cd_high)));
    store<8>(to + 3 * to_stride, Vector<8>(_mm256_unpackhi_pd(ab_high, cd_high)));
    return;
  }
#endif
  if constexpr (Width == 4) {
    const Vector<4> a = load<4>(from), b = load<4>(from + stride);
    const Vector<4> c = load<4>(from + 2 * stride), d = load<4>(from + 3 * stride);
    const Vector<4> ab_low = __builtin_shufflevector(a, b, 0, 4, 1, 5);
    const Vector<4> ab_high = __builtin_shufflevector(a, b, 2, 6, 3, 7);
    const Vector<4> cd_low = __builtin_shufflevector(c, d, 0, 4, 1, 5);
    const Vector<4> cd_high = __builtin_shufflevector(c, d, 2, 6, 3, 7);
    store<4>(to, __builtin_shufflevector(ab_low, cd_low, 0, 1, 4, 5));
    store<4>(to + to_stride, __builtin_shufflevector(ab_low, cd_low, 2, 3, 6, 7));
    store<4>(to + 2 * to_stride, __builtin_shufflevector(ab_high, cd_high, 0, 1, 4, 5));
    store<4>(to + 3 * to_stride, __builtin_shufflevector(ab_high, cd_high, 2, 3, 6, 7));
  }
}

}  // namespace
}  // namespace DQRM_LEVEL
}  // namespace dqrm
