// XXH64 with seed 0, from the public specification (github.com/Cyan4973/xxHash, doc/).
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

namespace dqrm {

namespace xxh64_detail {

constexpr uint64_t kPrime1 = 0x9E3779B185EBCA87u;
constexpr uint64_t kPrime2 = 0xC2B2AE3D27D4EB4Fu;
constexpr uint64_t kPrime3 = 0x165667B19E3779F9u;
constexpr uint64_t kPrime4 = 0x85EBCA77C2B2AE63u;
constexpr uint64_t kPrime5 = 0x27D4EB2F165667C5u;

inline uint64_t rotate(uint64_t value, int bits) { return value << bits | value >> (64 - bits); }

inline uint64_t round(uint64_t state, uint64_t lane) {
  return rotate(state + lane * kPrime2, 31) * kPrime1;
}

inline uint64_t load64(const uint8_t* from) {
  uint64_t value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

inline uint64_t load32(const uint8_t* from) {
  uint32_t value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

}  // namespace xxh64_detail

inline uint64_t xxh64(const uint8_t* data, size_t bytes) {
  using namespace xxh64_detail;
  const uint8_t* const end = data + bytes;
  uint64_t state = kPrime5;
  if (bytes >= 32) {
    uint64_t lanes[4] = {kPrime1 + kPrime2, kPrime2, 0, uint64_t{0} - kPrime1};
    for (; end - data >= 32; data += 32) {
      for (int i = 0; i < 4; ++i) lanes[i] = round(lanes[i], load64(data + 8 * i));
    }
    state = rotate(lanes[0], 1) + rotate(lanes[1], 7) + rotate(lanes[2], 12) + rotate(lanes[3], 18);
    for (const uint64_t lane : lanes) state = (state ^ round(0, lane)) * kPrime1 + kPrime4;
  }
  state += bytes;
  for (; end - data >= 8; data += 8) {
    state = rotate(state ^ round(0, load64(data)), 27) * kPrime1 + kPrime4;
  }
  if (end - data >= 4) {
    state = rotate(state ^ load32(data) * kPrime1, 23) * kPrime2 + kPrime3;
    data += 4;
  }
  for (; data != end; ++data) state = rotate(state ^ *data * kPrime5, 11) * kPrime1;
  state = (state ^ (state >> 33)) * kPrime2;
  state = (state ^ (state >> 29)) * kPrime3;
  return state ^ (state >> 32);
}

}  // namespace dqrm
