#include "keys.h"

#include <array>
#include <bit>
#include <cstddef>

namespace dqrm {

namespace {

constexpr int kBytes[4] = {1, 2, 3, 8};
constexpr uint64_t kMasks[4] = {0xFF, 0xFFFF, 0xFFFFFF, ~uint64_t(0)};

// Where the four gaps of a control byte begin, and what they take together: with these at hand no
// gap waits for the length of the one before.
struct Group {
  uint8_t begins[4];
  uint8_t bytes;
};

constexpr std::array<Group, 256> groups() {
  std::array<Group, 256> all{};
  for (int control = 0; control < 256; ++control) {
    int at = 0;
    for (int k = 0; k < 4; ++k) {
      all[size_t(control)].begins[k] = uint8_t(at);
      at += kBytes[control >> (2 * k) & 3];
    }
    all[size_t(control)].bytes = uint8_t(at);
  }
  return all;
}

constexpr std::array<Group, 256> kGroups = groups();
constexpr int64_t kMostGroupBytes = 4 * 8;

}  // namespace

static_assert(std::endian::native == std::endian::little, "gaps are copied as they lie in memory");

int64_t unpack_keys(const uint8_t* from, int64_t bytes, int64_t count, RowStride stride,
                    int64_t limit, int64_t* rows) {
  const int64_t control_bytes = (count + 3) / 4;
  if (bytes < control_bytes) return -1;
  // Keys below `keys` are rows below `limit`.
  const int64_t keys = limit <= stride.offset ? 0 : (limit - stride.offset - 1) / stride.stride + 1;
  int64_t at = control_bytes;
  uint64_t next = 0;  // the smallest key that may follow
  int64_t i = 0;
  for (; i + 4 <= count && at + kMostGroupBytes + 8 <= bytes; i += 4) {
    const unsigned control = from[i >> 2];
    const Group& group = kGroups[control];
    for (int k = 0; k < 4; ++k) {
      uint64_t gap;
      __builtin_memcpy(&gap, from + at + group.begins[k], 8);
      gap &= kMasks[control >> (2 * k) & 3];
      if (next >= uint64_t(keys) || gap >= uint64_t(keys) - next) return -1;
      next += gap;
      rows[i + k] = int64_t(next) * stride.stride + stride.offset;
      ++next;
    }
    at += group.bytes;
  }
  for (; i < count; ++i) {
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
