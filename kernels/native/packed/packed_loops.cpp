// Rows of codes become floats, are multiplied by their scale and added up in the order of the ids.
//
// value = scale * float(code), sum = ((0 + v0) + v1) + ..., mean = sum / count, weighted value =
// weight * value: element-wise, so equal bit for bit at every level and to the training forward.
#include "../common/simd.h"
#include "loops.h"

namespace dqrm {
namespace DQRM_LEVEL {
namespace {

// A random row is a cache miss of 100 ns and more; so many look-ups later it has arrived.
constexpr int64_t kAhead = 32;
// Samples whose bags of one table are looked up before those of the next table: their part of the
// output stays within reach of the second-level cache and its pages within that of the TLB.
constexpr int64_t kBlock = 64;
constexpr int64_t kLine = 64;

typedef uint8_t Bytes __attribute__((vector_size(kLanes)));
typedef int8_t SignedBytes __attribute__((vector_size(kLanes)));
typedef int16_t Shorts __attribute__((vector_size(2 * kLanes)));

// The compiler would widen lane by lane.
inline I32 widen(Bytes bytes) {
#if defined(__AVX512F__)
  return I32(_mm512_cvtepu8_epi32(__m128i(bytes)));
#elif defined(__AVX2__)
  return I32(_mm256_cvtepu8_epi32(_mm_set_epi64x(0, __builtin_bit_cast(int64_t, bytes))));
#else
  return __builtin_convertvector(bytes, I32);
#endif
}

inline I32 widen(SignedBytes bytes) {
#if defined(__AVX512F__)
  return I32(_mm512_cvtepi8_epi32(__m128i(bytes)));
#elif defined(__AVX2__)
  return I32(_mm256_cvtepi8_epi32(_mm_set_epi64x(0, __builtin_bit_cast(int64_t, bytes))));
#else
  return __builtin_convertvector(bytes, I32);
#endif
}

inline I32 widen(Shorts shorts) {
#if defined(__AVX512F__)
  return I32(_mm512_cvtepi16_epi32(__m256i(shorts)));
#elif defined(__AVX2__)
  return I32(_mm256_cvtepi16_epi32(__m128i(shorts)));
#else
  return __builtin_convertvector(shorts, I32);
#endif
}

template <typename Codes>
inline F32 to_floats(Codes codes) {
  return __builtin_convertvector(widen(codes), F32);
}

template <typename Id>
inline int64_t id_at(const PackedBatch& batch, int64_t at) {
  return static_cast<const Id*>(batch.ids)[at];
}

// Walks the ids in the order of the look-ups, ahead of them, and asks for their rows.
struct Prefetcher {
  int64_t at, end;       // in the ids of one table for a block of samples
  int64_t table, block;  // those: the table, the block's first sample
  int64_t last_sample;   // where the work ends
  const uint8_t* codes;
  const float* scales;   // null when the table has one
  int64_t row_bytes;
  bool straddles;        // whether a row may end in a line that its start does not tell
};

// Enters the next part that has ids; false when there is none.
__attribute__((noinline)) bool refill(const PackedBatch& batch, Prefetcher& ahead) {
  do {
    if (++ahead.table == batch.num_tables) {
      ahead.table = 0;
      ahead.block += kBlock;
    }
    if (ahead.block >= ahead.last_sample) {
      ahead.table = batch.num_tables - 1;
      return false;
    }
    const int64_t bag = ahead.table * batch.samples;
    const int64_t next = ahead.block + kBlock;
    const int64_t begin = bag + ahead.block;
    const int64_t end = bag + (next < ahead.last_sample ? next : ahead.last_sample);
    ahead.at = batch.offsets == nullptr ? begin : batch.offsets[begin];
    ahead.end = batch.offsets == nullptr ? end : batch.offsets[end];
  } while (ahead.at == ahead.end);
  const PackedTable& table = batch.tables[ahead.table];
  ahead.codes = table.codes;
  ahead.scales = table.scale_per_row ? table.scales : nullptr;
  ahead.row_bytes = table.row_bytes;
  const bool fits = kLine % table.row_bytes == 0 || table.row_bytes % kLine == 0;
  ahead.straddles = !fits || reinterpret_cast<uintptr_t>(table.codes) % kLine != 0;
  return true;
}

template <typename Id>
inline void prefetch_next(const PackedBatch& batch, Prefetcher& ahead) {
  if (ahead.at == ahead.end && !refill(batch, ahead)) return;
  const int64_t id = id_at<Id>(batch, ahead.at++);
  const uint8_t* row = ahead.codes + id * ahead.row_bytes;
  __builtin_prefetch(row);
  for (int64_t byte = kLine; byte < ahead.row_bytes; byte += kLine) __builtin_prefetch(row + byte);
  if (ahead.straddles) __builtin_prefetch(row + ahead.row_bytes - 1);
  if (ahead.scales != nullptr) __builtin_prefetch(ahead.scales + id);
}

// Floats of the codes in the low bits of each lane, shifted right by `shift` first.
template <int Bits>
inline F32 floats(I32 bytes, I32 shift) {
#if defined(__AVX512F__)
  // The permutation reads four bits of each lane, whatever stands above them.
  const F32 codes = Bits == 4 ? F32{0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1}
                              : F32{0, 1, -2, -1, 0, 1, -2, -1, 0, 1, -2, -1, 0, 1, -2, -1};
  return F32(_mm512_permutexvar_ps(__m512i(bytes >> shift), __m512(codes)));
#else
  const I32 signed_codes = (bytes << (32 - Bits - shift)) >> (32 - Bits);
  return __builtin_convertvector(signed_codes, F32);
#endif
}

// kLanes codes of a packed row of `width` bytes, from column `column` on.
// Bits 2 and 4: the columns lie within one part of the row, [width * part, width * (part + 1)).
template <int Bits>
inline F32 codes_at(const uint8_t* row, int64_t width, int64_t column) {
  if constexpr (Bits == 32) {
    return load(reinterpret_cast<const float*>(row) + column);
  } else if constexpr (Bits == 16) {
    Shorts codes;
    __builtin_memcpy(&codes, row + 2 * column, sizeof codes);
    return to_floats(codes);
  } else if constexpr (Bits == 8) {
    SignedBytes codes;
    __builtin_memcpy(&codes, row + column, sizeof codes);
    return to_floats(codes);
  } else {
    const int64_t part = column / width;
    Bytes bytes;
    __builtin_memcpy(&bytes, row + (column - part * width), sizeof bytes);
    return floats<Bits>(widen(bytes), I32{} + int32_t(part * Bits));
  }
}

inline Bytes repeat(uint64_t word) {
#if defined(__AVX512F__)
  return Bytes(_mm_set1_epi64x(int64_t(word)));
#else
  Bytes bytes;
  __builtin_memcpy(&bytes, &word, sizeof bytes);
  return bytes;
#endif
}

// The codes of a row of Vectors * kLanes columns.
template <int Bits, int Vectors>
inline void row_codes(const uint8_t* row, F32* codes) {
  constexpr int kWidth = Vectors * kLanes * Bits / 8;
  if constexpr (kWidth >= kLanes) {
    for (int v = 0; v < Vectors; ++v) codes[v] = codes_at<Bits>(row, kWidth, v * kLanes);
  } else {
    // The row has fewer bytes than a vector lanes: every vector holds several parts of it.
    uint64_t word = 0;
    __builtin_memcpy(&word, row, kWidth);
    // As often as it fits into the word.
    if constexpr (kWidth == 1) word *= 0x0101010101010101u;
    if constexpr (kWidth == 2) word *= 0x0001000100010001u;
    if constexpr (kWidth == 4) word *= 0x0000000100000001u;
    const I32 wide = widen(repeat(word));
    for (int v = 0; v < Vectors; ++v) {
      I32 shift;
      for (int lane = 0; lane < kLanes; ++lane) shift[lane] = (v * kLanes + lane) / kWidth * Bits;
      codes[v] = floats<Bits>(wide, shift);
    }
  }
}

// The first `count` < kLanes elements at `from`, zeros after them; nothing beyond is read.
template <typename Vector, typename T>
inline Vector load_few(const T* from, int64_t count) {
  T elements[kLanes] = {};
  for (int64_t i = 0; i < count; ++i) __builtin_memcpy(elements + i, from + i, sizeof(T));
  Vector vector;
  __builtin_memcpy(&vector, elements, sizeof vector);
  return vector;
}

// As codes_at for the `count` < kLanes columns that are left of a row's part.
template <int Bits>
inline F32 few_codes_at(const uint8_t* row, int64_t width, int64_t column, int64_t count) {
  if constexpr (Bits == 32) {
    return load_few<F32>(reinterpret_cast<const float*>(row) + column, count);
  } else if constexpr (Bits == 16) {
    const Shorts codes = load_few<Shorts>(reinterpret_cast<const int16_t*>(row) + column, count);
    return to_floats(codes);
  } else if constexpr (Bits == 8) {
    const auto codes = load_few<SignedBytes>(reinterpret_cast<const int8_t*>(row) + column, count);
    return to_floats(codes);
  } else {
    const int64_t part = column / width;
    const Bytes bytes = load_few<Bytes>(row + (column - part * width), count);
    return floats<Bits>(widen(bytes), I32{} + int32_t(part * Bits));
  }
}

inline void store_few(float* to, F32 value, int64_t count) {
  for (int64_t lane = 0; lane < count; ++lane) to[lane] = value[lane];
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
inline Factors factors(const PackedBatch& batch, const PackedTable& table, int64_t at, int64_t id) {
  Factors by{};
  if constexpr (Bits != 32) by.scale = all(table.scales[table.scale_per_row ? id : 0]);
  by.weighted = batch.weights != nullptr;
  if (by.weighted) by.weight = all(batch.weights[at]);
  return by;
}

// Writes a row's values to `out`, or adds them to what is there. Any number of columns.
template <int Bits, bool Add>
inline void put_row(const uint8_t* row, int64_t dim, const Factors& by, float* out) {
  constexpr int64_t kParts = Bits < 8 ? 8 / Bits : 1;
  const int64_t width = (dim + kParts - 1) / kParts;
  for (int64_t begin = 0; begin < dim; begin += width) {
    const int64_t end = begin + width < dim ? begin + width : dim;
    int64_t column = begin;
    for (; column + kLanes <= end; column += kLanes) {
      const F32 value = value_of<Bits>(codes_at<Bits>(row, width, column), by);
      store(out + column, Add ? load(out + column) + value : value);
    }
    if (column == end) continue;
    const int64_t count = end - column;
    const F32 value = value_of<Bits>(few_codes_at<Bits>(row, width, column, count), by);
    store_few(out + column, Add ? load_few<F32>(out + column, count) + value : value, count);
  }
}

// A bag's rows, pooled in registers when the row is a known number of vectors, else in `out`.
template <typename Id, int Bits, int Vectors>
inline void pool_bag(const PackedBatch& batch, const PackedTable& table, int64_t begin, int64_t end,
                     float* out, Prefetcher& ahead) {
  constexpr int kSums = Vectors == 0 ? 1 : Vectors;
  F32 sums[kSums] = {};
  if constexpr (Vectors == 0) __builtin_memset(out, 0, size_t(batch.dim) * sizeof(float));
  for (int64_t at = begin; at < end; ++at) {
    prefetch_next<Id>(batch, ahead);
    const int64_t id = id_at<Id>(batch, at);
    const uint8_t* row = table.codes + id * table.row_bytes;
    const Factors by = factors<Bits>(batch, table, at, id);
    if constexpr (Vectors == 0) {
      put_row<Bits, true>(row, batch.dim, by, out);
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
      store(out + v * kLanes, divide ? sums[v] / all(count) : sums[v]);
    }
  }
}

// The bags of one table for the samples [first, last).
template <typename Id, int Bits, int Vectors>
void look_up_segment(const PackedBatch& batch, int64_t number, int64_t first, int64_t last,
                     Prefetcher& ahead) {
  const PackedTable table = batch.tables[number];
  const int64_t bag = number * batch.samples;
  float* out = batch.out + first * batch.sample_stride + number * batch.dim;
  for (int64_t sample = first; sample < last; ++sample, out += batch.sample_stride) {
    if (batch.offsets != nullptr) {
      pool_bag<Id, Bits, Vectors>(batch, table, batch.offsets[bag + sample],
                              batch.offsets[bag + sample + 1], out, ahead);
      continue;
    }
    prefetch_next<Id>(batch, ahead);
    const int64_t id = id_at<Id>(batch, bag + sample);
    const uint8_t* row = table.codes + id * table.row_bytes;
    const Factors by = factors<Bits>(batch, table, bag + sample, id);
    if constexpr (Vectors == 0) {
      put_row<Bits, false>(row, batch.dim, by, out);
    } else {
      F32 codes[Vectors];
      row_codes<Bits, Vectors>(row, codes);
      for (int v = 0; v < Vectors; ++v) store(out + v * kLanes, value_of<Bits>(codes[v], by));
    }
  }
}

typedef void (*LookUpSegment)(const PackedBatch&, int64_t, int64_t, int64_t, Prefetcher&);

template <typename Id, int Bits>
LookUpSegment segment_loop(int64_t dim) {
  switch (dim) {
    case kLanes: return look_up_segment<Id, Bits, 1>;
    case 2 * kLanes: return look_up_segment<Id, Bits, 2>;
    case 4 * kLanes: return look_up_segment<Id, Bits, 4>;
    default: return look_up_segment<Id, Bits, 0>;
  }
}

template <typename Id>
LookUpSegment segment_loop(int32_t bits, int64_t dim) {
  switch (bits) {
    case 2: return segment_loop<Id, 2>(dim);
    case 4: return segment_loop<Id, 4>(dim);
    case 8: return segment_loop<Id, 8>(dim);
    case 16: return segment_loop<Id, 16>(dim);
    default: return segment_loop<Id, 32>(dim);
  }
}

template <typename Id>
void look_up_ids(const PackedBatch& batch, int64_t begin, int64_t end) {
  Prefetcher ahead{};
  ahead.table = -1;
  ahead.block = begin;
  ahead.last_sample = end;
  for (int64_t i = 0; i < kAhead; ++i) prefetch_next<Id>(batch, ahead);
  for (int64_t first = begin; first < end; first += kBlock) {
    const int64_t last = first + kBlock < end ? first + kBlock : end;
    for (int64_t table = 0; table < batch.num_tables; ++table) {
      segment_loop<Id>(batch.tables[table].bits, batch.dim)(batch, table, first, last, ahead);
    }
  }
}

void look_up(const PackedBatch& batch, int64_t begin, int64_t end) {
  if (batch.wide) {
    look_up_ids<int64_t>(batch, begin, end);
  } else {
    look_up_ids<int32_t>(batch, begin, end);
  }
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
