// The loops for any processor: what the compiler makes of plain C++, 8 bytes at a time in scan.
#include "loops.h"

namespace dqrm {
namespace scalar {
namespace {

constexpr uint32_t kNotDigits = 0xFFFFFFFFu;

// One bit a byte of text: bit i is set where byte i of the 8 is zero.
inline uint64_t zero_bytes(uint64_t word) {
  constexpr uint64_t kLow = 0x7F7F7F7F7F7F7F7Fu;
  const uint64_t tops = ~(((word & kLow) + kLow) | word | kLow);
  return (tops >> 7) * 0x0102040810204080u >> 56;
}

// Bits of the 64 bytes at text that are a newline, and those that are either separator.
inline uint64_t separators(const uint8_t* text, uint8_t delimiter, uint64_t* newlines) {
  constexpr uint64_t kOnes = 0x0101010101010101u;
  uint64_t lines = 0;
  uint64_t delimiters = 0;
  for (int part = 0; part < 8; ++part) {
    uint64_t word;
    __builtin_memcpy(&word, text + 8 * part, 8);
    lines |= zero_bytes(word ^ (kOnes * '\n')) << (8 * part);
    delimiters |= zero_bytes(word ^ (kOnes * delimiter)) << (8 * part);
  }
  *newlines = lines;
  return lines | delimiters;
}

inline void append_positions(uint64_t bits, uint32_t at, uint32_t* out) {
  for (; bits != 0; bits &= bits - 1) *out++ = at + uint32_t(__builtin_ctzll(bits));
}

#include "loops.inl"

}  // namespace

const Loops text_loops = {scan, extract, hash, digits, look_up, to_float, bucket, count_empty};

}  // namespace scalar

}  // namespace dqrm
