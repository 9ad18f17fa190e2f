#include "keys.h"

#include <bit>
#include <cstddef>

namespace dqrm {

static_assert(std::endian::native == std::endian::little, "gaps are copied as they lie in memory");

int64_t unpack_keys(const uint8_t* from, int64_t bytes, int64_t count, RowStride stride,
                    int64_t limit, int64_t* rows) {
  constexpr int kBytes[4] = {1, 2, 3, 8};
  constexpr uint64_t kMasks[4] = {0xFF, 0xFFFF, 0xFFFFFF, ~uint64_t(0)};
  const int64_t control_bytes = (count + 3) / 4;
  if (bytes < control_bytes) return -1;
  // Keys below `keys` are rows below `limit`.
  const int64_t keys = limit <= stride.offset ? 0 : (limit - stride.offset - 1) / stride.stride + 1;
  int64_t at = control_bytes;
  uint64_t next = 0;  // the smallest key that may follow
  for (int64_t i = 0; i < count; ++i) {
    const int code = from[i >> 2] >> (2 * (i & 3)) & 3;
    uint64_t gap = 0;
    if (at + 8 <= bytes) {
      __builtin_memcpy(&gap, from + at, 8);
      gap &= kMasks[code];
    } else {
      if (at + kBytes[code] > bytes) return -1;
      __builtin_memcpy(&gap, from + at, size_t(kBytes[code]));
    }
    at += kBytes[code];
    if (next >= uint64_t(keys) || gap >= uint64_t(keys) - next) return -1;
    const uint64_t key = next + gap;
    rows[i] = int64_t(key) * stride.stride + stride.offset;
    next = key + 1;
  }
  return at;
}

}  // namespace dqrm
