// The loops for processors with AVX-512 F, BW, DQ and VL.
#include <immintrin.h>

#include "loops.h"

namespace dqrm {
namespace avx512 {
namespace {

constexpr uint32_t kNotDigits = 0xFFFFFFFFu;

// Bits of the 64 bytes at text that are a newline, and those that are either separator.
inline uint64_t separators(const uint8_t* text, uint8_t delimiter, uint64_t* newlines) {
  const __m512i bytes = _mm512_loadu_si512(text);
  *newlines = _mm512_cmpeq_epi8_mask(bytes, _mm512_set1_epi8('\n'));
  return *newlines | _mm512_cmpeq_epi8_mask(bytes, _mm512_set1_epi8(char(delimiter)));
}

// A quarter of the bits at a time, without a branch. `out` has room for 64. Compressing into a
// register and storing it whole is far cheaper than compressing into memory on AMD.
inline void append_positions(uint64_t bits, uint32_t at, uint32_t* out) {
  __m512i place = _mm512_add_epi32(
      _mm512_set1_epi32(int(at)),
      _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
  for (int part = 0; part < 4; ++part) {
    const __mmask16 quarter = __mmask16(bits >> (16 * part));
    _mm512_storeu_si512(out, _mm512_maskz_compress_epi32(quarter, place));
    out += __builtin_popcount(quarter);
    place = _mm512_add_epi32(place, _mm512_set1_epi32(16));
  }
}

#include "loops.inl"

}  // namespace

const Loops text_loops = {scan, extract, hash, digits, look_up, to_float, bucket, count_empty};

}  // namespace avx512

}  // namespace dqrm
