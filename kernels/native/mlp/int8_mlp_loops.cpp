// Integer layers with codes of 16 bits, which every processor multiplies in pairs.
#include <utility>

#include "../common/simd.h"
#include "int8.h"

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace dqrm {
namespace DQRM_LEVEL {
namespace {

constexpr int kUnit = 2;
constexpr int kRows = kLanes == 16 ? 12 : 6;
constexpr int32_t kShift = 0;
typedef int16_t Code;
typedef I32 Sum;
typedef int32_t Lane;

struct Columns {
  F32 low;
  F32 high;
};

inline I32 multiply_add(U32 inputs, U32 weights, I32 sum) {
#if defined(__AVX512F__)
  return sum + I32(_mm512_madd_epi16(__m512i(inputs), __m512i(weights)));
#elif defined(__AVX2__)
  return sum + I32(_mm256_madd_epi16(__m256i(inputs), __m256i(weights)));
#elif defined(__SSE2__)
  return sum + I32(_mm_madd_epi16(__m128i(inputs), __m128i(weights)));
#else
  const I32 a = I32(inputs), b = I32(weights);
  return sum + (a << 16 >> 16) * (b << 16 >> 16) + (a >> 16) * (b >> 16);
#endif
}

}  // namespace
}  // namespace DQRM_LEVEL
}  // namespace dqrm

#include "int8.inl"
