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

// Four lanes each of every fourth row, kLanes / 4 rows in all.
inline F32 load_quads(const float* from, int64_t row_stride) {
#if defined(__AVX512F__)
  const __m512 two = _mm512_insertf32x4(_mm512_castps128_ps512(_mm_loadu_ps(from)),
                                        _mm_loadu_ps(from + 4 * row_stride), 1);
  return F32(_mm512_insertf32x4(
      _mm512_insertf32x4(two, _mm_loadu_ps(from + 8 * row_stride), 2),
      _mm_loadu_ps(from + 12 * row_stride), 3));
#elif defined(__AVX2__)
  return F32(_mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(from)),
                                  _mm_loadu_ps(from + 4 * row_stride), 1));
#else
  static_cast<void>(row_stride);
  return load(from);
#endif
}

// Transposes the 4 x 4 matrices that every four lanes of four vectors are.
inline void transpose_quads(F32& a, F32& b, F32& c, F32& d) {
#if defined(__AVX512F__)
  const __m512d ab_low = _mm512_castps_pd(_mm512_unpacklo_ps(__m512(a), __m512(b)));
  const __m512d ab_high = _mm512_castps_pd(_mm512_unpackhi_ps(__m512(a), __m512(b)));
  const __m512d cd_low = _mm512_castps_pd(_mm512_unpacklo_ps(__m512(c), __m512(d)));
  const __m512d cd_high = _mm512_castps_pd(_mm512_unpackhi_ps(__m512(c), __m512(d)));
  a = F32(_mm512_castpd_ps(_mm512_unpacklo_pd(ab_low, cd_low)));
  b = F32(_mm512_castpd_ps(_mm512_unpackhi_pd(ab_low, cd_low)));
  c = F32(_mm512_castpd_ps(_mm512_unpacklo_pd(ab_high, cd_high)));
  d = F32(_mm512_castpd_ps(_mm512_unpackhi_pd(ab_high, cd_high)));
#elif defined(__AVX2__)
  const __m256d ab_low = _mm256_castps_pd(_mm256_unpacklo_ps(__m256(a), __m256(b)));
  const __m256d ab_high = _mm256_castps_pd(_mm256_unpackhi_ps(__m256(a), __m256(b)));
  const __m256d cd_low = _mm256_castps_pd(_mm256_unpacklo_ps(__m256(c), __m256(d)));
  const __m256d cd_high = _mm256_castps_pd(_mm256_unpackhi_ps(__m256(c), __m256(d)));
  a = F32(_mm256_castpd_ps(_mm256_unpacklo_pd(ab_low, cd_low)));
  b = F32(_mm256_castpd_ps(_mm256_unpackhi_pd(ab_low, cd_low)));
  c = F32(_mm256_castpd_ps(_mm256_unpacklo_pd(ab_high, cd_high)));
  d = F32(_mm256_castpd_ps(_mm256_unpackhi_pd(ab_high, cd_high)));
#else
  const F32 ab_low = __builtin_shufflevector(a, b, 0, 4, 1, 5);
  const F32 ab_high = __builtin_shufflevector(a, b, 2, 6, 3, 7);
  const F32 cd_low = __builtin_shufflevector(c, d, 0, 4, 1, 5);
  const F32 cd_high = __builtin_shufflevector(c, d, 2, 6, 3, 7);
  a = __builtin_shufflevector(ab_low, cd_low, 0, 1, 4, 5);
  b = __builtin_shufflevector(ab_low, cd_low, 2, 3, 6, 7);
  c = __builtin_shufflevector(ab_high, cd_high, 0, 1, 4, 5);
  d = __builtin_shufflevector(ab_high, cd_high, 2, 3, 6, 7);
#endif
}

}  // namespace
}  // namespace DQRM_LEVEL
}  // namespace dqrm
