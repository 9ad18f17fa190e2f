// The loops for processors with AVX2, FMA and BMI.
#include <immintrin.h>

#include "loops.h"

namespace dqrm {
namespace avx2 {
namespace {

constexpr uint32_t kNotDigits = 0xFFFFFFFFu;

inline uint64_t equal(__m256i low, __m256i high, __m256i wanted) {
  const uint32_t first = uint32_t(_mm256_movemask_epi8(_mm256_cmpeq_epi8(low, wanted)));
  const uint32_t second = uint32_t(_mm256_movemask_epi8(_mm256_cmpeq_epi8(high, wanted)));
  return uint64_t{second} << 32 | first;
}

// Bits of the 64 bytes at text that are a newline, and those that are either separator.
inline uint64_t separators(const uint8_t* text, uint8_t delimiter, uint64_t* newlines) {
  const __m256i low = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(text));
  const __m256i high = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(text + 32));
  *newlines = equal(low, high, _mm256_set1_epi8('\n'));
  return *newlines | equal(low, high, _mm256_set1_epi8(char(delimiter)));
}

// Four at a time, a few too many: the branch on their number is the same most times, one on each
// bit would not be. `out` has room for 64.
inline void append_positions(uint64_t bits, uint32_t at, uint32_t* out) {
  uint32_t* const stop = out + __builtin_popcountll(bits);
  while (out < stop) {
    for (int i = 0; i < 4; ++i) {
      out[i] = at + uint32_t(_tzcnt_u64(bits));
      bits = _blsr_u64(bits);
    }
    out += 4;
  }
}

#include "loops.inl"

}  // namespace

const Loops text_loops = {scan, extract, hash, digits, look_up, to_float, bucket, count_empty};

}  // namespace avx2

}  // namespace dqrm
