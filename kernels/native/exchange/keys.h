// Ascending row numbers as the gaps between them, in 1, 2, 3 or 8 bytes each.
//
// Four gaps share a control byte, two bits a gap, the first lowest: 0, 1, 2 or 3 for 1, 2, 3 or 8
// bytes. All control bytes come first, then the gaps, lower byte first. The gap of row r after row p
// is r - p - 1, and p = -1 before the first. A stride keeps the gaps of every W-th row small: what is
// packed is r / stride, and all rows have the same r % stride.
#pragma once

#include <cstdint>

namespace dqrm {

// Bytes that pack_keys may write; it uses no more than it returns.
inline int64_t packed_keys_bound(int64_t count) { return (count + 3) / 4 + 8 * count; }

struct RowStride {
  int64_t stride;  // >= 1
  int64_t offset;  // in [0, stride)
};

// Writes `count` rows, which row(i) gives in ascending order without repeats; returns the bytes, or
// -1 where they do not ascend, are negative, or have another remainder.
template <typename Row>
int64_t pack_keys(Row row, int64_t count, RowStride stride, uint8_t* to);

// Reads `count` rows below `limit` and returns the bytes they took, or -1 where `bytes` are too few
// or hold no such rows.
int64_t unpack_keys(const uint8_t* from, int64_t bytes, int64_t count, RowStride stride,
                    int64_t limit, int64_t* rows);

template <typename Row>
int64_t pack_keys(Row row, int64_t count, RowStride stride, uint8_t* to) {
  uint8_t* control = to;
  uint8_t* data = to + (count + 3) / 4;
  int64_t previous = -1;
  unsigned codes = 0;
  for (int64_t i = 0; i < count; ++i) {
    int64_t key = row(i) - stride.offset;
    if (stride.stride != 1) {
      if (key % stride.stride != 0) return -1;
      key /= stride.stride;
    }
    if (key <= previous) return -1;
    const uint64_t gap = uint64_t(key - previous - 1);
    previous = key;
    const unsigned code = unsigned(gap > 0xFF) + unsigned(gap > 0xFFFF) + unsigned(gap > 0xFFFFFF);
    __builtin_memcpy(data, &gap, 8);
    data += code + 1 + (code == 3 ? 4 : 0);
    codes |= code << (2 * (i & 3));
    if ((i & 3) == 3) {
      *control++ = uint8_t(codes);
      codes = 0;
    }
  }
  if ((count & 3) != 0) *control = uint8_t(codes);
  return data - to;
}

}  // namespace dqrm
