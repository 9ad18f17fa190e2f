// Vectors of bytes and of 16-bit words, and the way from and to vectors of 32-bit lanes; for
// *_loops.cpp only. The compiler would convert lane by lane.
#pragma once

#include "simd.h"

namespace dqrm {
namespace DQRM_LEVEL {
namespace {

typedef int8_t I8 __attribute__((vector_size(kLanes)));
typedef uint16_t U16 __attribute__((vector_size(2 * kLanes)));

inline I32 widen(I8 bytes) {
#if defined(__AVX512F__)
  return I32(_mm512_cvtepi8_epi32(__m128i(bytes)));
#elif defined(__AVX2__)
  return I32(_mm256_cvtepi8_epi32(_mm_cvtsi64_si128(__builtin_bit_cast(int64_t, bytes))));
#else
  return __builtin_convertvector(bytes, I32);
#endif
}

// The lower byte of each lane.
inline I8 narrow_to_bytes(I32 lanes) {
#if defined(__AVX512F__)
  return I8(_mm512_cvtepi32_epi8(__m512i(lanes)));
#elif defined(__AVX2__)
  const __m128i first = _mm_setr_epi8(0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1);
  const __m128i low = _mm_shuffle_epi8(_mm256_castsi256_si128(__m256i(lanes)), first);
  const __m128i high = _mm_shuffle_epi8(_mm256_extracti128_si256(__m256i(lanes), 1), first);
  return __builtin_bit_cast(I8, _mm_cvtsi128_si64(_mm_unpacklo_epi32(low, high)));
#else
  return __builtin_convertvector(lanes, I8);
#endif
}

inline U32 widen(U16 words) {
#if defined(__AVX512F__)
  return U32(_mm512_cvtepu16_epi32(__m256i(words)));
#elif defined(__AVX2__)
  return U32(_mm256_cvtepu16_epi32(__m128i(words)));
#else
  return __builtin_convertvector(words, U32);
#endif
}

// Lanes below 2^16.
inline U16 narrow_to_words(U32 lanes) {
#if defined(__AVX512F__)
  return U16(_mm512_cvtepi32_epi16(__m512i(lanes)));
#elif defined(__AVX2__)
  const __m256i packed = _mm256_packus_epi32(__m256i(lanes), __m256i(lanes));
  return U16(_mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0b1000)));
#else
  return __builtin_convertvector(lanes, U16);
#endif
}

// The first `count` <= kLanes elements at `from`, zeros after them; nothing behind them is read.
template <typename Vector, typename T>
inline Vector load_few(const T* from, int count) {
  T elements[kLanes] = {};
  __builtin_memcpy(elements, from, sizeof(T) * size_t(count));
  Vector vector;
  __builtin_memcpy(&vector, elements, sizeof vector);
  return vector;
}

}  // namespace
}  // namespace DQRM_LEVEL
}  // namespace dqrm
