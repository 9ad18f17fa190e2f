// Rows, and an optimizer's state of rows, in bfloat16; for *_loops.cpp only.
#pragma once

#include "../common/rounding.h"
#include "rows.h"

namespace dqrm {
namespace DQRM_LEVEL {
namespace {

template <int Dim>
inline void load_bfloat_row(const uint16_t* from, int dim, F32* row) {
  const int width = Dim != 0 ? Dim : dim;
  const int vectors = row_vectors<Dim>(dim);
  for (int k = 0; k < vectors; ++k) {
    const int left = width - k * kLanes;
    U16 words;
    if (left >= kLanes) {
      __builtin_memcpy(&words, from + k * kLanes, sizeof words);
    } else {
      words = load_few<U16>(from + k * kLanes, left);
    }
    row[k] = F32(widen(words) << 16);
  }
}

// Rounds the row, whose elements count from `first` on, and leaves in it what was stored.
template <int Dim>
inline void store_bfloat_row(uint16_t* to, int dim, uint32_t row_key, uint32_t first, F32* row) {
  const int width = Dim != 0 ? Dim : dim;
  const int vectors = row_vectors<Dim>(dim);
  for (int k = 0; k < vectors; ++k) {
    row[k] = round_to_bfloat16(row[k], random_lanes(row_key, first + uint32_t(k * kLanes)));
    const U16 words = narrow_to_words(U32(row[k]) >> 16);
    const int left = width - k * kLanes;
    __builtin_memcpy(to + k * kLanes, &words, 2 * size_t(left < kLanes ? left : kLanes));
  }
}

// State of a row beside weights that are rounded.
struct BFloatState {
  template <int Dim>
  static void load(const void* state, int64_t row, int dim, F32* values) {
    const int64_t width = Dim != 0 ? Dim : dim;
    load_bfloat_row<Dim>(static_cast<const uint16_t*>(state) + row * width, dim, values);
  }

  template <int Dim>
  static void store(void* state, int64_t row, int dim, uint32_t row_key, uint32_t first,
                    F32* values) {
    const int64_t width = Dim != 0 ? Dim : dim;
    store_bfloat_row<Dim>(static_cast<uint16_t*>(state) + row * width, dim, row_key, first, values);
  }

  static float load_one(const void* state, int64_t row) {
    return from_bfloat16(static_cast<const uint16_t*>(state)[row]);
  }

  static void store_one(void* state, int64_t row, uint32_t row_key, uint32_t element,
                        float value) {
    static_cast<uint16_t*>(state)[row] =
        round_to_bfloat16(value, random_bits(row_key, element));
  }

  static constexpr int kBytes = 2;
};

struct BFloatRows {
  using State = BFloatState;
  static constexpr bool kOnGrid = false;

  static uint32_t key(const Storage& storage, int64_t row) { return row_key(storage.key, row); }

  static uint16_t* at(const Storage& storage, int64_t row) {
    return static_cast<uint16_t*>(storage.memory) + row * storage.dim;
  }

  template <int Dim>
  static void load(const Storage& storage, int64_t row, F32* values) {
    load_bfloat_row<Dim>(at(storage, row), storage.dim, values);
  }

  template <int Dim>
  static void write(const Storage& storage, int64_t row, F32* values) {
    store_bfloat_row<Dim>(at(storage, row), storage.dim, key(storage, row), 0, values);
  }

  template <int Dim, bool Write>
  static void prefetch(const Storage& storage, int64_t row) {
    prefetch_bytes<Write>(at(storage, row), 2 * int64_t(Dim != 0 ? Dim : storage.dim));
  }
};

}  // namespace
}  // namespace DQRM_LEVEL
}  // namespace dqrm
