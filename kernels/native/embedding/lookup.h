// Gather, fake-quantize, pool; for *_loops.cpp only. The order of operations is that of the packed
// tables; it is written down at TableBatchReference.lookup.
#pragma once

#include "loops.h"
#include "rows.h"

namespace dqrm {
namespace DQRM_LEVEL {
namespace {

// Rows asked for ahead of use.
constexpr int64_t kAhead = 16;

template <typename Id>
int64_t first_outside_of(const Id* ids, int64_t count, int64_t rows) {
  constexpr int64_t kChunk = 256;
  for (int64_t chunk = 0; chunk < count; chunk += kChunk) {
    const int64_t end = chunk + kChunk < count ? chunk + kChunk : count;
    bool outside = false;
    if constexpr (sizeof(Id) == 4) {
      const uint32_t limit = rows > INT32_MAX ? uint32_t(INT32_MAX) + 1 : uint32_t(rows);
      for (int64_t i = chunk; i < end; ++i) outside |= uint32_t(ids[i]) >= limit;
    } else {
      for (int64_t i = chunk; i < end; ++i) outside |= uint64_t(ids[i]) >= uint64_t(rows);
    }
    if (!outside) continue;
    for (int64_t i = chunk; i < end; ++i) {
      if (ids[i] < 0 || int64_t(ids[i]) >= rows) return i;
    }
  }
  return count;
}

int64_t first_outside(const void* ids, bool wide, int64_t count, int64_t rows) {
  return wide ? first_outside_of(static_cast<const int64_t*>(ids), count, rows)
              : first_outside_of(static_cast<const int32_t*>(ids), count, rows);
}

int64_t first_descent(const int64_t* offsets, int64_t count) {
  constexpr int64_t kChunk = 256;
  for (int64_t chunk = 1; chunk < count; chunk += kChunk) {
    const int64_t end = chunk + kChunk < count ? chunk + kChunk : count;
    bool descends = false;
    for (int64_t i = chunk; i < end; ++i) descends |= offsets[i] < offsets[i - 1];
    if (!descends) continue;
    for (int64_t i = chunk; i < end; ++i) {
      if (offsets[i] < offsets[i - 1]) return i;
    }
  }
  return count;
}

// Values of a row on its grid. The operands' order lets NaN through minimum and maximum, and
// rounding after the clamp equals clamping after it, as the limits are whole numbers.
template <Grid G>
inline void quantize_row(const TableView& table, F32* row, int vectors) {
  if constexpr (G != Grid::none) {
    const F32 scale =
        all(G == Grid::row ? scale_of(row_max(row, vectors), table.largest) : table.scale);
    const F32 low = all(-table.largest - 1.0f), high = all(table.largest);
    for (int k = 0; k < vectors; ++k) {
      row[k] = scale * round_half_even(min(high, max(low, row[k] / scale)));
    }
  }
}

template <typename Rows, int Dim, Grid G, typename Id>
void look_up_with(const Storage& storage, const TableView& table, const Bags& bags,
                  const Output& output, int64_t begin, int64_t end) {
  const Id* ids = static_cast<const Id*>(bags.ids);
  const int vectors = row_vectors<Dim>(storage.dim);
  const int64_t last_id = bags.end;
  int64_t id = bags.offsets != nullptr ? bags.offsets[begin] : bags.begin + begin;
  F32 row[kRowVectors<Dim>], sum[kRowVectors<Dim>];
  for (int64_t bag = begin; bag < end; ++bag) {
    const int64_t bag_end = bags.offsets != nullptr ? bags.offsets[bag + 1] : id + 1;
    const float count = float(bag_end - id);
    for (int k = 0; k < vectors; ++k) sum[k] = F32{};
    for (; id < bag_end; ++id) {
      if (id + kAhead < last_id) {
        Rows::template prefetch<Dim, false>(storage, table.first_row + int64_t(ids[id + kAhead]));
      }
      Rows::template load<Dim>(storage, table.first_row + int64_t(ids[id]), row);
      quantize_row<G>(table, row, vectors);
      if (bags.weights != nullptr) {
        const F32 weight = all(bags.weights[id]);
        for (int k = 0; k < vectors; ++k) row[k] = weight * row[k];
      }
      for (int k = 0; k < vectors; ++k) sum[k] = sum[k] + row[k];
    }
    if (bags.mean && count > 1.0f) {
      for (int k = 0; k < vectors; ++k) sum[k] = sum[k] / all(count);
    }
    float* to = output.data + bag * output.stride;
    if (output.streamed) {
      for (int k = 0; k < vectors; ++k) stream(to + k * kLanes, sum[k]);
    } else {
      store_row<Dim>(to, storage.dim, sum);
    }
  }
  if (output.streamed) fence();
}

template <typename Rows, int Dim, Grid G>
void look_up_on(const Storage& storage, const TableView& table, const Bags& bags,
                const Output& output, int64_t begin, int64_t end) {
  if (bags.wide) {
    look_up_with<Rows, Dim, G, int64_t>(storage, table, bags, output, begin, end);
  } else {
    look_up_with<Rows, Dim, G, int32_t>(storage, table, bags, output, begin, end);
  }
}

template <typename Rows>
void look_up(const Storage& storage, const TableView& table, const Bags& bags,
             const Output& output, int64_t begin, int64_t end) {
  with_dim(storage.dim, [&]<int Dim>() {
    if constexpr (Rows::kOnGrid) {
      return look_up_on<Rows, Dim, Grid::none>(storage, table, bags, output, begin, end);
    }
    switch (table.grid) {
      case Grid::none:
        return look_up_on<Rows, Dim, Grid::none>(storage, table, bags, output, begin, end);
      case Grid::table:
        return look_up_on<Rows, Dim, Grid::table>(storage, table, bags, output, begin, end);
      case Grid::row:
        return look_up_on<Rows, Dim, Grid::row>(storage, table, bags, output, begin, end);
    }
  });
}

template <typename Rows>
float largest(const Storage& storage, int64_t first_row, int64_t count) {
  float found = 0.0f;
  with_dim(storage.dim, [&]<int Dim>() {
    const int vectors = row_vectors<Dim>(storage.dim);
    F32 row[kRowVectors<Dim>], most{};
    for (int64_t at = first_row; at < first_row + count; ++at) {
      Rows::template load<Dim>(storage, at, row);
      for (int k = 0; k < vectors; ++k) most = max(abs(row[k]), most);
    }
    found = largest_lane(most);
  });
  return found;
}

template <typename Rows>
constexpr LookupLoops kLookupLoops{first_outside, first_descent, look_up<Rows>, largest<Rows>};

}  // namespace
}  // namespace DQRM_LEVEL
}  // namespace dqrm
