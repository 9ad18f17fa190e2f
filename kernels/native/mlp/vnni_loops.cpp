// Integer layers with codes of 8 bits, for processors with AVX512-VNNI. Its instruction takes
// inputs without a sign: 128 is added to them and, times the sum of the weights, taken off again.
#include <immintrin.h>

#include <utility>

#include "../common/simd.h"
#include "int8.h"

namespace dqrm {
namespace DQRM_LEVEL {
namespace {

constexpr int kUnit = 4;
constexpr int kRows = 12;
constexpr int32_t kShift = 128;
typedef uint8_t Code;
typedef I32 Sum;
typedef int32_t Lane;

struct Columns {
  F32 low;
  F32 high;
};

inline I32 multiply_add(U32 inputs, U32 weights, I32 sum) {
  return I32(_mm512_dpbusd_epi32(__m512i(sum), __m512i(inputs), __m512i(weights)));
}

}  // namespace
}  // namespace DQRM_LEVEL
}  // namespace dqrm

#include "int8.inl"
