// Linear layers in FP32.
#include <utility>

#include "../common/simd.h"
#include "loops.h"

namespace dqrm {
namespace DQRM_LEVEL {
namespace {

constexpr int kUnit = 1;
// Two vectors of sums a row: 24 or 12 registers, which leaves enough for the operands.
constexpr int kRows = kLanes == 16 ? 12 : 6;

typedef F32 Sum;
typedef float Lane;

inline F32 multiply_add(U32 a, U32 b, F32 sum) { return fma(F32(a), F32(b), sum); }

// A panel's columns.
struct Columns {
  F32 low;
  F32 high;
};

inline U32 columns_unit(F32 low, F32) { return U32(low); }

inline void store_units(uint32_t* to, F32 low, F32 high) {
  __builtin_memcpy(to, &low, sizeof low);
  __builtin_memcpy(to + kLanes, &high, sizeof high);
}

// A unit holds one row.
inline void pair_rows(Columns even, Columns, uint32_t* to) {
  store_units(to, even.low, even.high);
}

inline void pair_units(const uint32_t* even, const uint32_t*, uint32_t* to) {
  __builtin_memcpy(to, even, 2 * sizeof(F32));
}

inline uint32_t active_lanes(F32 value) {
  const I32 is = value != F32{};
#if defined(__AVX512F__)
  return _mm512_movepi32_mask(__m512i(is));
#elif defined(__AVX2__)
  return uint32_t(_mm256_movemask_ps(__m256(is)));
#else
  uint32_t bits = 0;
  for (int lane = 0; lane < kLanes; ++lane) bits |= uint32_t(is[lane] & 1) << lane;
  return bits;
#endif
}

inline uint32_t active(Columns value) {
  return active_lanes(value.low) | active_lanes(value.high) << kLanes;
}

inline F32 keep_lanes(F32 value, uint32_t active) {
  U32 bit;
  for (int lane = 0; lane < kLanes; ++lane) bit[lane] = 1u << lane;
  return (bit & active) != 0 ? value : F32{};
}

inline Columns keep(Columns value, uint32_t active) {
  return {keep_lanes(value.low, active), keep_lanes(value.high, active >> kLanes)};
}

}  // namespace
}  // namespace DQRM_LEVEL
}  // namespace dqrm

#include "loops.inl"
