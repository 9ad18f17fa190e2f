// Packed codes to floats: vectors of a row's codes from its bytes.
//
// For files named *_loops.cpp only; see common/level.h. Rows are laid out as
// dqrm/kernels/code_layout.py describes.
#pragma once

#include "../common/simd.h"

namespace dqrm {
namespace DQRM_LEVEL {
namespace {

typedef uint8_t Bytes __attribute__((vector_size(kLanes)));
typedef int8_t SignedBytes __attribute__((vector_size(kLanes)));
typedef int16_t Shorts __attribute__((vector_size(2 * kLanes)));

// The compiler would widen lane by lane.
inline I32 widen(Bytes bytes) {
#if defined(__AVX512F__)
  return I32(_mm512_cvtepu8_epi32(__m128i(bytes)));
#elif defined(__AVX2__)
  return I32(_mm256_cvtepu8_epi32(_mm_set_epi64x(0, __builtin_bit_cast(int64_t, bytes))));
#else
  return __builtin_convertvector(bytes, I32);
#endif
}

inline I32 widen(SignedBytes bytes) {
#if defined(__AVX512F__)
  return I32(_mm512_cvtepi8_epi32(__m128i(bytes)));
#elif defined(__AVX2__)
  return I32(_mm256_cvtepi8_epi32(_mm_set_epi64x(0, __builtin_bit_cast(int64_t, bytes))));
#else
  return __builtin_convertvector(bytes, I32);
#endif
}

inline I32 widen(Shorts shorts) {
#if defined(__AVX512F__)
  return I32(_mm512_cvtepi16_epi32(__m256i(shorts)));
#elif defined(__AVX2__)
  return I32(_mm256_cvtepi16_epi32(__m128i(shorts)));
#else
  return __builtin_convertvector(shorts, I32);
#endif
}

template <typename Codes>
inline F32 to_floats(Codes codes) {
  return __builtin_convertvector(widen(codes), F32);
}

// Floats of the codes in the low bits of each lane, shifted right by `shift` first.
template <int Bits>
inline F32 floats(I32 bytes, I32 shift) {
#if defined(__AVX512F__)
  // The permutation reads four bits of each lane, whatever stands above them.
  const F32 codes = Bits == 4 ? F32{0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1}
                              : F32{0, 1, -2, -1, 0, 1, -2, -1, 0, 1, -2, -1, 0, 1, -2, -1};
  return F32(_mm512_permutexvar_ps(__m512i(bytes >> shift), __m512(codes)));
#else
  const I32 signed_codes = (bytes << (32 - Bits - shift)) >> (32 - Bits);
  return __builtin_convertvector(signed_codes, F32);
#endif
}

// kLanes codes of a packed row of `width` bytes, from column `column` on.
// Bits 2 and 4: the columns lie within one part of the row, [width * part, width * (part + 1)).
template <int Bits>
inline F32 codes_at(const uint8_t* row, int64_t width, int64_t column) {
  if constexpr (Bits == 32) {
    return load(reinterpret_cast<const float*>(row) + column);
  } else if constexpr (Bits == 16) {
    Shorts codes;
    __builtin_memcpy(&codes, row + 2 * column, sizeof codes);
    return to_floats(codes);
  } else if constexpr (Bits == 8) {
    SignedBytes codes;
    __builtin_memcpy(&codes, row + column, sizeof codes);
    return to_floats(codes);
  } else {
    const int64_t part = column / width;
    Bytes bytes;
    __builtin_memcpy(&bytes, row + (column - part * width), sizeof bytes);
    return floats<Bits>(widen(bytes), I32{} + int32_t(part * Bits));
  }
}

inline Bytes repeat(uint64_t word) {
#if defined(__AVX512F__)
  return Bytes(_mm_set1_epi64x(int64_t(word)));
#else
  Bytes bytes;
  __builtin_memcpy(&bytes, &word, sizeof bytes);
  return bytes;
#endif
}

// The codes of a row of Vectors * kLanes columns.
template <int Bits, int Vectors>
inline void row_codes(const uint8_t* row, F32* codes) {
  constexpr int kWidth = Vectors * kLanes * Bits / 8;
  if constexpr (kWidth >= kLanes) {
    for (int v = 0; v < Vectors; ++v) codes[v] = codes_at<Bits>(row, kWidth, v * kLanes);
  } else {
    // The row has fewer bytes than a vector lanes: every vector holds several parts of it.
    uint64_t word = 0;
    __builtin_memcpy(&word, row, kWidth);
    // As often as it fits into the word.
    if constexpr (kWidth == 1) word *= 0x0101010101010101u;
    if constexpr (kWidth == 2) word *= 0x0001000100010001u;
    if constexpr (kWidth == 4) word *= 0x0000000100000001u;
    const I32 wide = widen(repeat(word));
    for (int v = 0; v < Vectors; ++v) {
      I32 shift;
      for (int lane = 0; lane < kLanes; ++lane) shift[lane] = (v * kLanes + lane) / kWidth * Bits;
      codes[v] = floats<Bits>(wide, shift);
    }
  }
}

// The first `count` < kLanes elements at `from`, zeros after them; nothing beyond is read.
template <typename Vector, typename T>
inline Vector load_few(const T* from, int64_t count) {
  T elements[kLanes] = {};
  for (int64_t i = 0; i < count; ++i) __builtin_memcpy(elements + i, from + i, sizeof(T));
  Vector vector;
  __builtin_memcpy(&vector, elements, sizeof vector);
  return vector;
}

// As codes_at for the `count` < kLanes columns that are left of a row's part.
template <int Bits>
inline F32 few_codes_at(const uint8_t* row, int64_t width, int64_t column, int64_t count) {
  if constexpr (Bits == 32) {
    return load_few<F32>(reinterpret_cast<const float*>(row) + column, count);
  } else if constexpr (Bits == 16) {
    const Shorts codes = load_few<Shorts>(reinterpret_cast<const int16_t*>(row) + column, count);
    return to_floats(codes);
  } else if constexpr (Bits == 8) {
    const auto codes = load_few<SignedBytes>(reinterpret_cast<const int8_t*>(row) + column, count);
    return to_floats(codes);
  } else {
    const int64_t part = column / width;
    const Bytes bytes = load_few<Bytes>(row + (column - part * width), count);
    return floats<Bits>(widen(bytes), I32{} + int32_t(part * Bits));
  }
}

}  // namespace
}  // namespace DQRM_LEVEL
}  // namespace dqrm
