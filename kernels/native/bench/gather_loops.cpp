#include "../common/simd.h"
#include "gather.h"

namespace dqrm {
namespace DQRM_LEVEL {
namespace {

constexpr int64_t kVector = sizeof(F32);
constexpr int64_t kLine = 64;

F32 load_bytes(const uint8_t* from) {
  F32 value;
  __builtin_memcpy(&value, from, sizeof value);
  return value;
}

void store_bytes(uint8_t* to, F32 value) { __builtin_memcpy(to, &value, sizeof value); }

void prefetch(const uint8_t* row, int64_t row_bytes) {
  for (int64_t at = 0; at < row_bytes; at += kLine) __builtin_prefetch(row + at);
  // A row that begins inside a line ends inside another.
  __builtin_prefetch(row + row_bytes - 1);
}

// A row as wide as the output is copied.
void copy_row(const uint8_t* row, int64_t bytes, uint8_t* out) {
  int64_t at = 0;
  for (; at + kVector <= bytes; at += kVector) store_bytes(out + at, load_bytes(row + at));
  if (at < bytes) __builtin_memcpy(out + at, row + at, size_t(bytes - at));
}

// A packed row is read whole, folded to 4 bytes, and those written as often as fills the output:
// the traffic of unpacking it, without the arithmetic.
void spread_row(const uint8_t* row, int64_t row_bytes, int64_t out_bytes, uint8_t* out) {
  uint32_t folded = 0;
  int64_t at = 0;
  for (; at + 8 <= row_bytes; at += 8) {
    uint64_t word;
    __builtin_memcpy(&word, row + at, 8);
    folded ^= uint32_t(word) ^ uint32_t(word >> 32);
  }
  for (; at < row_bytes; ++at) folded ^= row[at];
  const F32 value = F32(folded - U32{});
  at = 0;
  for (; at + kVector <= out_bytes; at += kVector) store_bytes(out + at, value);
  if (at < out_bytes) __builtin_memcpy(out + at, &value, size_t(out_bytes - at));
}

bool inside(const int64_t* rows, int64_t count, int64_t height) {
  uint64_t outside = 0;
  for (int64_t i = 0; i < count; ++i) outside |= uint64_t(rows[i]) >= uint64_t(height);
  return outside == 0;
}

void gather(const uint8_t* table, const int64_t* rows, int64_t begin, int64_t end,
            int64_t row_bytes, int64_t out_bytes, int64_t ahead, uint8_t* out) {
  const bool copied = row_bytes == out_bytes;
  for (int64_t i = begin; i < end; ++i) {
    if (ahead && i + ahead < end) prefetch(table + rows[i + ahead] * row_bytes, row_bytes);
    const uint8_t* row = table + rows[i] * row_bytes;
    uint8_t* to = out + i * out_bytes;
    if (copied) {
      copy_row(row, row_bytes, to);
    } else {
      spread_row(row, row_bytes, out_bytes, to);
    }
  }
}

}  // namespace

extern const GatherLoops gather_loops{inside, gather};

}  // namespace DQRM_LEVEL
}  // namespace dqrm
