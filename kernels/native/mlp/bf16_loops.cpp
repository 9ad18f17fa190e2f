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

inline F32 multiply_add(U32 a, U32 b, F32 sum) {
  return F32(_mm512_dpbf16_ps(__m512(sum), __m512bh(a), __m512bh(b)));
}

// Columns in order: the first of a unit is its low half.
inline U32 transposable(F32 low, F32 high) {
  return U32(_mm512_cvtne2ps_pbh(__m512(high), __m512(low)));
}

inline void store_units(uint32_t* to, F32 low, F32 high) {
  const U32 value = transposable(low, high);
  __builtin_memcpy(to, &value, sizeof value);
}

inline void load_units(const uint32_t* from, F32* low, F32* high) {
  const __m512i both = _mm512_loadu_si512(from);
  *low = F32(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_castsi512_si256(both)), 16));
  *high = F32(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(both, 1)), 16));
}

inline U32 pair_rows(F32 even, F32 odd) {
  const __m512i both = __m512i(_mm512_cvtne2ps_pbh(__m512(odd), __m512(even)));
  const __m512i order = _mm512_set_epi16(
      31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5, 20, 4, 19,
      3, 18, 2, 17, 1, 16, 0);
  return U32(_mm512_permutexvar_epi16(order, both));
}

}  // namespace
}  // namespace DQRM_LEVEL
}  // namespace dqrm

#include "loops.inl"
