// Stochastic rounding; for *_loops.cpp only. The hash and what is made of its bits are defined in
// dqrm.kernels.rounding; every level gives the same bits.
#pragma once

#include "narrow.h"

namespace dqrm {
namespace DQRM_LEVEL {
namespace {

constexpr uint32_t kGolden = 0x9E3779B9u;

// Word: uint32_t or U32.
template <typename Word>
inline Word mix32(Word x) {
  x = (x ^ (x >> 16)) * 0x21F0AAADu;
  x = (x ^ (x >> 15)) * 0x735A2D97u;
  return x ^ (x >> 15);
}

inline uint32_t row_key(uint64_t key, int64_t row) {
  const uint32_t low = mix32(uint32_t(row) ^ uint32_t(key));
  return mix32(low ^ uint32_t(uint64_t(row) >> 32) ^ uint32_t(key >> 32));
}

inline uint32_t random_bits(uint32_t row_key, uint32_t element) {
  return mix32(row_key + kGolden * element);
}

// Of kLanes elements from `first` on.
inline U32 random_lanes(uint32_t row_key, uint32_t first) {
  U32 element;
  for (int lane = 0; lane < kLanes; ++lane) element[lane] = kGolden * uint32_t(lane);
  return mix32(element + (row_key + kGolden * first));
}

// Rounds to an integer, down or up; |value| < 2^22.
inline F32 round_to_integer(F32 value, U32 bits) {
  const F32 zero{}, one = all(1.0f);
  F32 floor = round_half_even(value);
  floor = floor - (floor > value ? one : zero);
  const F32 chance = __builtin_convertvector(I32(bits >> 8), F32) * 0x1p-24f;
  return floor + (chance < value - floor ? one : zero);
}

// Rounds to bfloat16, towards or away from zero.
inline F32 round_to_bfloat16(F32 value, U32 bits) {
  const F32 nan = F32(U32{} + 0x7FC00000u);
  const U32 carried = (U32(value) + (bits >> 16)) & 0xFFFF0000u;
  return value == value ? F32(carried) : nan;
}

inline uint16_t round_to_bfloat16(float value, uint32_t bits) {
  if (value != value) return 0x7FC0;
  uint32_t word;
  __builtin_memcpy(&word, &value, sizeof word);
  return uint16_t((word + (bits >> 16)) >> 16);
}

inline float from_bfloat16(uint16_t word) {
  const uint32_t wide = uint32_t(word) << 16;
  float value;
  __builtin_memcpy(&value, &wide, sizeof value);
  return value;
}

}  // namespace
}  // namespace DQRM_LEVEL
}  // namespace dqrm
