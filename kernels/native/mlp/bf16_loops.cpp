// Linear layers whose operands are bfloat16 and whose sums are FP32, for processors with
// AVX512-BF16. Its instructions take denormals for zero and round operands to nearest, ties to
// even.
#include <immintrin.h>

#include <utility>

#include "../common/simd.h"
#include "loops.h"

namespace dqrm {
namespace DQRM_LEVEL {
namespace {

constexpr int kUnit = 2;
constexpr int kRows = 12;

typedef F32 Sum;
typedef float Lane;

inline F32 multiply_add(U32 a, U32 b, F32 sum) {
  return F32(_mm512_dpbf16_ps(__m512(sum), __m512bh(a), __m512bh(b)));
}

// A panel's columns, in the order of store_units and pair_rows.
struct Columns {
  F32 low;
  F32 high;
};

// Of two neighbours the first is the low half.
inline U32 columns_unit(F32 low, F32 high) {
  return U32(_mm512_cvtne2ps_pbh(__m512(high), __m512(low)));
}

inline void store_units(uint32_t* to, F32 low, F32 high) {
  _mm512_storeu_si512(to, __m512i(columns_unit(low, high)));
}

inline __m512i interleave() {
  return _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22,
                          6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
}

inline void pair_rows(Columns even, Columns odd, uint32_t* to) {
  const __m512i low = __m512i(_mm512_cvtne2ps_pbh(__m512(odd.low), __m512(even.low)));
  const __m512i high = __m512i(_mm512_cvtne2ps_pbh(__m512(odd.high), __m512(even.high)));
  _mm512_storeu_si512(to, _mm512_permutexvar_epi16(interleave(), low));
  _mm512_storeu_si512(to + kLanes, _mm512_permutexvar_epi16(interleave(), high));
}

inline void pair_units(const uint32_t* even, const uint32_t* odd, uint32_t* to) {
  // Bit 5 of an index chooses the second operand.
  const __m512i second = _mm512_set1_epi32(16 << 16);
  const __m512i low = _mm512_add_epi16(interleave(), second);
  const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
  const __m512i a = _mm512_loadu_si512(even), b = _mm512_loadu_si512(odd);
  _mm512_storeu_si512(to, _mm512_permutex2var_epi16(a, low, b));
  _mm512_storeu_si512(to + kLanes, _mm512_permutex2var_epi16(a, high, b));
}

inline uint32_t active(Columns value) {
  const __m512 zero = _mm512_setzero_ps();
  return _mm512_cmp_ps_mask(__m512(value.low), zero, _CMP_NEQ_UQ) |
         uint32_t(_mm512_cmp_ps_mask(__m512(value.high), zero, _CMP_NEQ_UQ)) << kLanes;
}

inline Columns keep(Columns value, uint32_t active) {
  return {F32(_mm512_maskz_mov_ps(__mmask16(active), __m512(value.low))),
          F32(_mm512_maskz_mov_ps(__mmask16(active >> 16), __m512(value.high)))};
}

}  // namespace
}  // namespace DQRM_LEVEL
}  // namespace dqrm

#include "loops.inl"
