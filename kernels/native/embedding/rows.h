// Rows as vectors, and how each storage reads and writes them; for *_loops.cpp only.
//
// Dim is the row's width, or 0 where it is known at run time only. A row that does not fill its
// last vector is padded with zeros.
#pragma once

#include "../common/simd.h"
#include "types.h"

namespace dqrm {
namespace DQRM_LEVEL {
namespace {

template <int Dim>
constexpr int kRowVectors = (Dim != 0 ? Dim : kMaxDim) / kLanes;

template <int Dim>
inline int row_vectors(int dim) {
  return ((Dim != 0 ? Dim : dim) + kLanes - 1) / kLanes;
}

template <int Dim>
inline void load_row(const float* from, int dim, F32* row) {
  const int width = Dim != 0 ? Dim : dim;
  const int whole = width / kLanes;
  for (int k = 0; k < whole; ++k) row[k] = load(from + k * kLanes);
  if (width % kLanes != 0) row[whole] = load_part(from + whole * kLanes, width % kLanes);
}

template <int Dim>
inline void store_row(float* to, int dim, const F32* row) {
  const int width = Dim != 0 ? Dim : dim;
  const int whole = width / kLanes;
  for (int k = 0; k < whole; ++k) store(to + k * kLanes, row[k]);
  if (width % kLanes != 0) store_part(to + whole * kLanes, row[whole], width % kLanes);
}

// The longest run of lines a row's prefetch asks for; the processor follows a longer run itself.
constexpr int64_t kPrefetchBytes = 512;

// Inlined by force: to GCC a function that only prefetches has no effect, and it drops the call.
template <bool Write>
[[gnu::always_inline]] inline void prefetch_bytes(const void* from, int64_t bytes) {
  const char* at = static_cast<const char*>(from);
  const int64_t asked = bytes < kPrefetchBytes ? bytes : kPrefetchBytes;
  for (int64_t line = 0; line < asked; line += 64) __builtin_prefetch(at + line, Write ? 1 : 0, 3);
}

// An optimizer's state of rows. Elements that are rounded with a row are numbered from `first` on,
// and the row itself from zero.
struct Fp32State {
  static constexpr int kBytes = 4;

  template <int Dim>
  static void load(const void* state, int64_t row, int dim, F32* values) {
    const int64_t width = Dim != 0 ? Dim : dim;
    load_row<Dim>(static_cast<const float*>(state) + row * width, dim, values);
  }

  template <int Dim>
  static void store(void* state, int64_t row, int dim, uint32_t, uint32_t, const F32* values) {
    const int64_t width = Dim != 0 ? Dim : dim;
    store_row<Dim>(static_cast<float*>(state) + row * width, dim, values);
  }

  static float load_one(const void* state, int64_t row) {
    return static_cast<const float*>(state)[row];
  }

  static void store_one(void* state, int64_t row, uint32_t, uint32_t, float value) {
    static_cast<float*>(state)[row] = value;
  }
};

// A storage says how a row becomes floats and floats a row; `row` counts over all tables. key() is
// what the random bits of a row are made from, where it is rounded; write() leaves what it stored
// in `values`.
struct Fp32Rows {
  using State = Fp32State;
  static constexpr bool kOnGrid = false;

  static uint32_t key(const Storage&, int64_t) { return 0; }

  static float* at(const Storage& storage, int64_t row) {
    return static_cast<float*>(storage.memory) + row * storage.dim;
  }

  template <int Dim>
  static void load(const Storage& storage, int64_t row, F32* values) {
    load_row<Dim>(at(storage, row), storage.dim, values);
  }

  template <int Dim>
  static void write(const Storage& storage, int64_t row, const F32* values) {
    store_row<Dim>(at(storage, row), storage.dim, values);
  }

  template <int Dim, bool Write>
  [[gnu::always_inline]] static void prefetch(const Storage& storage, int64_t row) {
    prefetch_bytes<Write>(at(storage, row), 4 * int64_t(Dim != 0 ? Dim : storage.dim));
  }
};

// Largest magnitude of a row; NaN does not count.
inline float row_max(const F32* row, int vectors) {
  F32 found{};
  for (int k = 0; k < vectors; ++k) found = max(abs(row[k]), found);
  return largest_lane(found);
}

// The smallest range a scale is made of; SMALLEST_MAX_ABS of the reference.
constexpr float kSmallestMaxAbs = 1e-8f;

inline float scale_of(float max_abs, float largest) {
  return (max_abs < kSmallestMaxAbs ? kSmallestMaxAbs : max_abs) / largest;
}

// The scale of a row under a grid other than Grid::none.
inline float row_scale(const TableView& table, const F32* row, int vectors) {
  return table.grid == Grid::row ? scale_of(row_max(row, vectors), table.largest) : table.scale;
}

// Calls function<Dim>() with the width as a constant where it is a common one.
template <typename Function>
inline void with_dim(int dim, Function function) {
  switch (dim) {
    case 16:
      return function.template operator()<16>();
    case 32:
      return function.template operator()<32>();
    case 64:
      return function.template operator()<64>();
    case 128:
      return function.template operator()<128>();
    default:
      return function.template operator()<0>();
  }
}

}  // namespace
}  // namespace DQRM_LEVEL
}  // namespace dqrm
