// Rows as integer codes with a step each; for *_loops.cpp only. Layout and rules are defined in
// dqrm.kernels.row_codes.
#pragma once

#include "bfloat_rows.h"

namespace dqrm {
namespace DQRM_LEVEL {
namespace {

constexpr int kStepBytes = 2;
constexpr float kHeadroom = 1.25f;
constexpr float kShrink = 0.5f;

inline uint16_t bfloat16_above(float value) {
  uint32_t word;
  __builtin_memcpy(&word, &value, sizeof word);
  return uint16_t((word + 0xFFFFu) >> 16);
}

constexpr uint64_t kLowHalves = 0x0F0F0F0F0F0F0F0Fu;

// Codes of four bits, low halves of the bytes first; `half` bytes.
template <int Dim>
inline void unpack_halves(const uint8_t* from, int dim, I32* codes) {
  if constexpr (Dim == kLanes) {
    static_assert(Dim == 16);
    uint64_t both;
    __builtin_memcpy(&both, from, 8);
    typedef uint64_t Pair __attribute__((vector_size(16)));
    const Pair pair{both & kLowHalves, (both >> 4) & kLowHalves};
    I8 bytes;
    __builtin_memcpy(&bytes, &pair, sizeof bytes);
    codes[0] = (widen(bytes) ^ 8) - 8;
  } else if constexpr (Dim != 0) {
    constexpr int kHalf = Dim / 2 / kLanes;
    static_assert(Dim % (2 * kLanes) == 0);
    for (int k = 0; k < kHalf; ++k) {
      I8 bytes;
      __builtin_memcpy(&bytes, from + k * kLanes, sizeof bytes);
      const I32 wide = widen(bytes);
      codes[k] = (wide << 28) >> 28;
      codes[k + kHalf] = wide >> 4;
    }
  } else {
    int8_t bytes[kMaxDim + kLanes];
    const int half = (dim + 1) / 2;
    for (int j = 0; j < half; ++j) {
      const int8_t both = int8_t(from[j]);
      bytes[j] = int8_t(int8_t(both << 4) >> 4);
      bytes[half + j] = int8_t(both >> 4);
    }
    for (int k = 0; k < row_vectors<0>(dim); ++k) {
      const int left = dim - k * kLanes;
      codes[k] = widen(load_few<I8>(bytes + k * kLanes, left < kLanes ? left : kLanes));
    }
  }
}

// `codes`: one byte each, zero beyond the row.
template <int Dim>
inline void pack_halves(const int8_t* codes, int dim, uint8_t* to) {
  const int half = ((Dim != 0 ? Dim : dim) + 1) / 2;
  if constexpr (Dim == 16) {
    uint64_t low, high;
    __builtin_memcpy(&low, codes, 8);
    __builtin_memcpy(&high, codes + 8, 8);
    const uint64_t both = (low & kLowHalves) | ((high & kLowHalves) << 4);
    __builtin_memcpy(to, &both, 8);
  } else {
    for (int j = 0; j < half; ++j) {
      to[j] = uint8_t((codes[j] & 15) | (uint8_t(codes[half + j]) << 4));
    }
  }
}

template <int Bits>
struct CodeRows {
  using State = BFloatState;
  static constexpr bool kOnGrid = true;
  static constexpr float kLargest = float((1 << (Bits - 1)) - 1);

  static uint32_t key(const Storage& storage, int64_t row) { return row_key(storage.key, row); }

  static int64_t row_bytes(int dim) { return kStepBytes + (int64_t(dim) * Bits + 7) / 8; }

  template <int Dim>
  static uint8_t* at(const Storage& storage, int64_t row) {
    return static_cast<uint8_t*>(storage.memory) + row * row_bytes(Dim != 0 ? Dim : storage.dim);
  }

  template <int Dim>
  static void load(const Storage& storage, int64_t row, F32* values) {
    const uint8_t* from = at<Dim>(storage, row);
    const F32 step = all(step_of(from));
    const int vectors = row_vectors<Dim>(storage.dim);
    I32 codes[kRowVectors<Dim>];
    if constexpr (Bits == 4) {
      unpack_halves<Dim>(from + kStepBytes, storage.dim, codes);
    } else {
      const int8_t* bytes = reinterpret_cast<const int8_t*>(from + kStepBytes);
      for (int k = 0; k < vectors; ++k) {
        const int left = (Dim != 0 ? Dim : storage.dim) - k * kLanes;
        codes[k] = widen(load_few<I8>(bytes + k * kLanes, left < kLanes ? left : kLanes));
      }
    }
    for (int k = 0; k < vectors; ++k) values[k] = step * __builtin_convertvector(codes[k], F32);
  }

  // Unlike other storages, does not leave in `values` what was stored: nothing reads it.
  template <int Dim>
  static void write(const Storage& storage, int64_t row, const F32* values) {
    uint8_t* to = at<Dim>(storage, row);
    const int vectors = row_vectors<Dim>(storage.dim);
    int8_t codes[(Dim != 0 ? Dim : kMaxDim) + kLanes];
    uint16_t step;
    __builtin_memcpy(&step, to, sizeof step);
    if (!fits(values, vectors, from_bfloat16(step)) && !new_step(values, vectors, &step)) {
      __builtin_memset(codes, 0, sizeof codes);
    } else {
      const uint32_t row_key = key(storage, row);
      const F32 divisor = all(from_bfloat16(step));
      for (int k = 0; k < vectors; ++k) {
        const U32 bits = random_lanes(row_key, uint32_t(k * kLanes));
        const F32 code = round_to_integer(values[k] / divisor, bits);
        const I8 bytes = narrow_to_bytes(__builtin_convertvector(code, I32));
        __builtin_memcpy(codes + k * kLanes, &bytes, sizeof bytes);
      }
    }
    __builtin_memcpy(to, &step, kStepBytes);
    if constexpr (Bits == 4) {
      pack_halves<Dim>(codes, storage.dim, to + kStepBytes);
    } else {
      __builtin_memcpy(to + kStepBytes, codes, size_t(Dim != 0 ? Dim : storage.dim));
    }
  }

  template <int Dim, bool Write>
  static void prefetch(const Storage& storage, int64_t row) {
    const uint8_t* from = at<Dim>(storage, row);
    const int64_t bytes = row_bytes(Dim != 0 ? Dim : storage.dim);
    prefetch_bytes<Write>(from, bytes);
    // A row may end in a line that its start does not tell.
    __builtin_prefetch(from + bytes - 1, Write ? 1 : 0, 3);
  }

 private:
  static float step_of(const uint8_t* row) {
    uint16_t step;
    __builtin_memcpy(&step, row, sizeof step);
    return from_bfloat16(step);
  }

  // Whether a row may keep its step. Compares element by element: the largest magnitude would be
  // known only many cycles after the row.
  static bool fits(const F32* values, int vectors, float step) {
    const float largest = step * kLargest;
    const F32 range = all(largest), half = all(largest * kShrink);
    I32 inside = ~I32{}, used{};
    for (int k = 0; k < vectors; ++k) {
      const F32 size = abs(values[k]);
      inside &= size <= range;
      used |= size >= half;
    }
    return largest > 0.0f && largest <= __FLT_MAX__ && !any(~inside) && any(used);
  }

  // A step with room for `values`; false, and NaN, if one is not finite.
  [[gnu::noinline]] static bool new_step(const F32* values, int vectors, uint16_t* step) {
    I32 finite = ~I32{};
    for (int k = 0; k < vectors; ++k) finite &= abs(values[k]) <= all(__FLT_MAX__);
    if (any(~finite)) {
      *step = 0x7FC0;
      return false;
    }
    const float max_abs = row_max(values, vectors);
    const float covered = max_abs < kSmallestMaxAbs ? kSmallestMaxAbs : max_abs;
    *step = bfloat16_above(covered * (kHeadroom / kLargest));
    return true;
  }
};

}  // namespace
}  // namespace DQRM_LEVEL
}  // namespace dqrm
