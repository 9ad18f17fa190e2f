// Vectors of the width of the level this file is compiled for, in GCC's and Clang's own notation:
// the same source becomes AVX-512, AVX2, or what any other processor has.
//
// For files named *_loops.cpp only; see level.h. Multiplication and addition are not contracted
// (-ffp-contract=off): results that are to be equal bit for bit at every level may use only
// element-wise operations; fma() is for those that are not.
#pragma once

#include <cstddef>
#include <cstdint>

#ifdef __AVX2__
#include <immintrin.h>
#endif

namespace dqrm {
namespace DQRM_LEVEL {
namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float F32 __attribute__((vector_size(4 * kLanes)));
typedef int32_t I32 __attribute__((vector_size(4 * kLanes)));
typedef uint32_t U32 __attribute__((vector_size(4 * kLanes)));

inline F32 load(const float* from) {
  F32 value;
  __builtin_memcpy(&value, from, sizeof value);
  return value;
}

inline void store(float* to, F32 value) { __builtin_memcpy(to, &value, sizeof value); }

// Past the caches, to an aligned address; fence() before another thread reads.
inline void stream(float* to, F32 value) {
#if defined(__AVX512F__)
  _mm512_stream_ps(to, __m512(value));
#elif defined(__AVX2__)
  _mm256_stream_ps(to, __m256(value));
#else
  store(to, value);
#endif
}

inline void fence() {
#if defined(__AVX2__)
  _mm_sfence();
#endif
}

// The first `count` lanes, 0 < count < kLanes; nothing behind them is touched.
inline F32 load_part(const float* from, int count) {
#if defined(__AVX512F__)
  return F32(_mm512_maskz_loadu_ps(__mmask16((1u << count) - 1), from));
#else
  F32 value{};
  for (int lane = 0; lane < count; ++lane) value[lane] = from[lane];
  return value;
#endif
}

inline void store_part(float* to, F32 value, int count) {
#if defined(__AVX512F__)
  _mm512_mask_storeu_ps(to, __mmask16((1u << count) - 1), __m512(value));
#else
  for (int lane = 0; lane < count; ++lane) to[lane] = value[lane];
#endif
}

inline F32 all(float value) { return value - F32{}; }

inline F32 min(F32 a, F32 b) { return a < b ? a : b; }
inline F32 max(F32 a, F32 b) { return a > b ? a : b; }

inline F32 abs(F32 a) { return F32(U32(a) & 0x7FFFFFFFu); }

inline F32 fma(F32 a, F32 b, F32 c) {
#if defined(__AVX512F__)
  return F32(_mm512_fmadd_ps(__m512(a), __m512(b), __m512(c)));
#elif defined(__AVX2__)
  return F32(_mm256_fmadd_ps(__m256(a), __m256(b), __m256(c)));
#else
  return a * b + c;
#endif
}

// Rounded correctly at every level.
inline F32 sqrt(F32 a) {
#if defined(__AVX512F__)
  return F32(_mm512_sqrt_ps(__m512(a)));
#elif defined(__AVX2__)
  return F32(_mm256_sqrt_ps(__m256(a)));
#else
  for (int lane = 0; lane < kLanes; ++lane) a[lane] = __builtin_sqrtf(a[lane]);
  return a;
#endif
}

// Whether any lane of a comparison's result is set.
inline bool any(I32 mask) {
#if defined(__AVX512F__)
  return _mm512_movepi32_mask(__m512i(mask)) != 0;
#elif defined(__AVX2__)
  return _mm256_movemask_ps(__m256(mask)) != 0;
#else
  int32_t found = 0;
  for (int lane = 0; lane < kLanes; ++lane) found |= mask[lane];
  return found != 0;
#endif
}

// Whether any lane of a is greater than that of b, or any of c at least that of d.
inline bool any_greater_or_at_least(F32 a, F32 b, F32 c, F32 d) {
#if defined(__AVX512F__)
  return _kortestz_mask16_u8(_mm512_cmp_ps_mask(__m512(a), __m512(b), _CMP_GT_OQ),
                             _mm512_cmp_ps_mask(__m512(c), __m512(d), _CMP_GE_OQ)) == 0;
#else
  return any((a > b) | (c >= d));
#endif
}

// The sum of the 16 lanes of all vectors: i and i + 8 first, then i and i + 4, ...; equal bit for
// bit at every level.
inline float sum_of_16(const F32* lanes) {
  typedef float F4 __attribute__((vector_size(16)));
  F4 fours[4];
  __builtin_memcpy(fours, lanes, sizeof fours);
  const F4 halves = (fours[0] + fours[2]) + (fours[1] + fours[3]);
  return (halves[0] + halves[2]) + (halves[1] + halves[3]);
}

// The largest lane.
inline float largest_lane(F32 a) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps(__m512(a));
#else
  float found = a[0];
  for (int lane = 1; lane < kLanes; ++lane) found = a[lane] > found ? a[lane] : found;
  return found;
#endif
}

// Rounds to the nearest integer, ties to even; exact for |a| < 2^22. Adding 1.5 * 2^23 leaves no
// bits for a fraction.
inline F32 round_half_even(F32 a) {
  const F32 magic = all(12582912.0f);
  return (a + magic) - magic;
}

}  // namespace
}  // namespace DQRM_LEVEL
}  // namespace dqrm
