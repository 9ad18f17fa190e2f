// Rows of codes become floats, are multiplied by their scale and added up in the order of the ids.
//
// value = scale * float(code), sum = ((0 + v0) + v1) + ..., mean = sum / count, weighted value =
// weight * value: element-wise, so equal bit for bit at every level and to the training forward.
#include "../common/simd.h"
#include "loops.h"
#include "prefetch.h"
#include "unpack.h"

namespace dqrm {
namespace DQRM_LEVEL {
namespace {

// A random row is a cache miss of 100 ns and more; so many look-ups later it has arrived.
constexpr int64_t kAhead = 32;

inline void store_few(float* to, F32 value, int64_t count) {
  for (int64_t lane = 0; lane < count; ++lane) to[lane] = value[lane];
}

// Past the caches where asked; 64 bytes at a time must then be written one after the other.
inline void store(float* to, F32 value, [[maybe_unused]] bool streamed) {
#if defined(__AVX512F__)
  if (streamed) return _mm512_stream_ps(to, __m512(value));
#elif defined(__AVX2__)
  if (streamed) return _mm256_stream_ps(to, __m256(value));
#endif
  store(to, value);
}

// What a looked-up code is multiplied by.
struct Factors {
  F32 scale, weight;
  bool weighted;
};

template <int Bits>
inline F32 value_of(F32 codes, const Factors& by) {
  F32 value = codes;
  if constexpr (Bits != 32) value = by.scale * value;
  return by.weighted ? by.weight * value : value;
}

template <int Bits>
inline Factors factors(const PackedTable& table, const float* weights, int64_t at, int64_t id) {
  Factors by{};
  if constexpr (Bits != 32) by.scale = all(table.scales[id & table.scale_mask]);
  by.weighted = weights != nullptr;
  if (by.weighted) by.weight = all(weights[at]);
  return by;
}

// Writes a row's values, added to zero, to `out`, or adds them to what is there. Any number of columns.
template <int Bits, bool Add>
inline void put_row(const uint8_t* row, int64_t dim, const Factors& by, bool streamed, float* out) {
  constexpr int64_t kParts = Bits < 8 ? 8 / Bits : 1;
  const int64_t width = (dim + kParts - 1) / kParts;
  // Lines that are also written piecemeal must not be streamed.
  streamed = streamed && width % kLanes == 0;
  for (int64_t begin = 0; begin < dim; begin += width) {
    const int64_t end = begin + width < dim ? begin + width : dim;
    int64_t column = begin;
    for (; column + kLanes <= end; column += kLanes) {
      const F32 value = value_of<Bits>(codes_at<Bits>(row, width, column), by);
      if constexpr (Add) {
        store(out + column, load(out + column) + value);
      } else {
        store(out + column, F32{} + value, streamed);
      }
    }
    if (column == end) continue;
    const int64_t count = end - column;
    const F32 value = value_of<Bits>(few_codes_at<Bits>(row, width, column, count), by);
    const F32 sum = Add ? load_few<F32>(out + column, count) : F32{};
    store_few(out + column, sum + value, count);
  }
}

// Bytes of a row of Vectors * kLanes columns, known where Vectors is not 0.
template <int Bits, int Vectors>
inline int64_t row_bytes(const PackedTable& table) {
  return Vectors == 0 ? table.row_bytes : Vectors * kLanes * Bits / 8;
}

// One id a bag: its value, added to zero. For the samples [first, last) of one table; weights are
// heeded where Vectors is 0.
template <typename Id, int Bits, int Vectors>
void copy_rows(const PackedBatch& batch, int64_t number, int64_t first, int64_t last,
               Prefetcher& shared) {
  const PackedTable table = batch.tables[number];
  const float* weights = Vectors == 0 ? batch.weights : nullptr;
  const int64_t stride = batch.sample_stride, dim = batch.dim;
  float* out = batch.out + first * stride + number * dim;
  const Id* ids = static_cast<const Id*>(batch.ids);
  int64_t at = number * batch.samples + first;
  for (int64_t left = last - first; left > 0;) {
    // As many rows as the prefetcher has left in the table it is at, so as not to look after it.
    // When it has no more, rows that are here already are asked for again.
    const bool done = shared.at == shared.end && !refill(batch, shared);
    const Prefetcher ahead = shared;
    const int64_t ready = ahead.end - ahead.at;
    const int64_t count = done || left < ready ? left : ready;
    const Id* next = ids + (done ? at : ahead.at);
    shared.at += done ? 0 : count;
    left -= count;
    for (const int64_t stop = at + count; at < stop; ++at, ++next, out += stride) {
      prefetch_row(ahead, *next);
      const uint8_t* row = table.codes + int64_t(ids[at]) * row_bytes<Bits, Vectors>(table);
      const Factors by = factors<Bits>(table, weights, at, ids[at]);
      if constexpr (Vectors == 0) {
        put_row<Bits, false>(row, dim, by, batch.streamed, out);
      } else {
        F32 codes[Vectors];
        row_codes<Bits, Vectors>(row, codes);
        for (int v = 0; v < Vectors; ++v) {
          store(out + v * kLanes, F32{} + value_of<Bits>(codes[v], by), batch.streamed);
        }
      }
    }
  }
}

// A bag's rows, pooled in registers when the row is a known number of vectors, else in `out`.
template <typename Id, int Bits, int Vectors>
inline void pool_bag(const PackedBatch& batch, const PackedTable& table, int64_t begin, int64_t end,
                     float* out, Prefetcher& ahead) {
  constexpr int kSums = Vectors == 0 ? 1 : Vectors;
  F32 sums[kSums] = {};
  if constexpr (Vectors == 0) __builtin_memset(out, 0, size_t(batch.dim) * sizeof(float));
  const Id* ids = static_cast<const Id*>(batch.ids);
  for (int64_t at = begin; at < end; ++at) {
    prefetch_next<Id>(batch, ahead);
    const uint8_t* row = table.codes + int64_t(ids[at]) * row_bytes<Bits, Vectors>(table);
    const Factors by = factors<Bits>(table, batch.weights, at, ids[at]);
    if constexpr (Vectors == 0) {
      put_row<Bits, true>(row, batch.dim, by, false, out);
    } else {
      F32 codes[kSums];
      row_codes<Bits, Vectors>(row, codes);
      for (int v = 0; v < Vectors; ++v) sums[v] = sums[v] + value_of<Bits>(codes[v], by);
    }
  }
  const float count = float(end - begin);
  const bool divide = batch.mean && end > begin;
  if constexpr (Vectors == 0) {
    if (!divide) return;
    for (int64_t column = 0; column < batch.dim; ++column) out[column] /= count;
  } else {
    for (int v = 0; v < Vectors; ++v) {
      store(out + v * kLanes, divide ? sums[v] / all(count) : sums[v], batch.streamed);
    }
  }
}

// Bags of any number of ids, of the samples [first, last) of one table.
template <typename Id, int Bits, int Vectors>
void pool_rows(const PackedBatch& batch, int64_t number, int64_t first, int64_t last,
               Prefetcher& ahead) {
  const PackedTable table = batch.tables[number];
  const int64_t* offsets = batch.offsets + number * batch.samples;
  float* out = batch.out + first * batch.sample_stride + number * batch.dim;
  for (int64_t sample = first; sample < last; ++sample, out += batch.sample_stride) {
    pool_bag<Id, Bits, Vectors>(batch, table, offsets[sample], offsets[sample + 1], out, ahead);
  }
}

typedef void (*LookUpSegment)(const PackedBatch&, int64_t, int64_t, int64_t, Prefetcher&);

template <typename Id, bool Pool, int Bits>
LookUpSegment segment_loop(int64_t dim) {
  switch (dim) {
    case kLanes: return Pool ? pool_rows<Id, Bits, 1> : copy_rows<Id, Bits, 1>;
    case 2 * kLanes: return Pool ? pool_rows<Id, Bits, 2> : copy_rows<Id, Bits, 2>;
    case 4 * kLanes: return Pool ? pool_rows<Id, Bits, 4> : copy_rows<Id, Bits, 4>;
    case 8 * kLanes: return Pool ? pool_rows<Id, Bits, 8> : copy_rows<Id, Bits, 8>;
    default: return Pool ? pool_rows<Id, Bits, 0> : copy_rows<Id, Bits, 0>;
  }
}

template <typename Id, bool Pool>
LookUpSegment segment_loop(int32_t bits, int64_t dim) {
  switch (bits) {
    case 2: return segment_loop<Id, Pool, 2>(dim);
    case 4: return segment_loop<Id, Pool, 4>(dim);
    case 8: return segment_loop<Id, Pool, 8>(dim);
    case 16: return segment_loop<Id, Pool, 16>(dim);
    default: return segment_loop<Id, Pool, 32>(dim);
  }
}

template <typename Id, bool Pool>
void look_up_ids(const PackedBatch& batch, int64_t begin, int64_t end) {
  Prefetcher ahead{};
  ahead.table = -1;
  ahead.block = begin;
  ahead.last_sample = end;
  for (int64_t i = 0; i < kAhead; ++i) prefetch_next<Id>(batch, ahead);
  for (int64_t first = begin; first < end; first += kBlock) {
    const int64_t last = first + kBlock < end ? first + kBlock : end;
    for (int64_t table = 0; table < batch.num_tables; ++table) {
      const int64_t dim = Pool || batch.weights == nullptr ? batch.dim : 0;
      segment_loop<Id, Pool>(batch.tables[table].bits, dim)(batch, table, first, last, ahead);
    }
  }
}

void look_up(const PackedBatch& batch, int64_t begin, int64_t end) {
  if (batch.offsets == nullptr) {
    batch.wide ? look_up_ids<int64_t, false>(batch, begin, end)
               : look_up_ids<int32_t, false>(batch, begin, end);
  } else {
    batch.wide ? look_up_ids<int64_t, true>(batch, begin, end)
               : look_up_ids<int32_t, true>(batch, begin, end);
  }
#ifdef __AVX2__
  // Streamed writes reach other threads in order only behind a fence.
  if (batch.streamed) _mm_sfence();
#endif
}

template <typename Id, typename Unsigned>
int64_t first_outside_of(const Id* ids, int64_t count, int64_t rows) {
  constexpr int64_t kChunk = 256;
  for (int64_t begin = 0; begin < count; begin += kChunk) {
    const int64_t end = begin + kChunk < count ? begin + kChunk : count;
    // One comparison finds negative ids as well: unsigned, they are larger than any row.
    Unsigned outside = 0;
    for (int64_t i = begin; i < end; ++i) outside |= Unsigned(Unsigned(ids[i]) >= Unsigned(rows));
    if (!outside) continue;
    for (int64_t i = begin; i < end; ++i) {
      if (ids[i] < 0 || ids[i] >= rows) return i;
    }
  }
  return count;
}

int64_t first_outside(const void* ids, bool wide, int64_t count, int64_t rows) {
  if (wide) {
    return first_outside_of<int64_t, uint64_t>(static_cast<const int64_t*>(ids), count, rows);
  }
  // A table of more rows than int32 can name takes every id but the negative ones.
  const int64_t named = rows < (int64_t(1) << 31) ? rows : int64_t(1) << 31;
  return first_outside_of<int32_t, uint32_t>(static_cast<const int32_t*>(ids), count, named);
}

}  // namespace

const PackedLoops packed_loops = {&first_outside, &look_up};

}  // namespace DQRM_LEVEL
}  // namespace dqrm
