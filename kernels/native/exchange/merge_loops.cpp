// Sums of the values of equal rows, in the order in which they occur.
#include "../common/simd.h"
#include "loops.h"

namespace dqrm {
namespace DQRM_LEVEL {
namespace {

constexpr int64_t kAhead = 16;  // Entries whose values are fetched before they are needed.
constexpr int64_t kLine = 16;   // Floats in a cache line.

// Vectors at a time, so that a row's values are read in few passes over its entries.
template <int Vectors>
inline void sum_columns(const uint64_t* entry, const uint64_t* end, uint64_t mask,
                        const float* values, int64_t dim, float* sums) {
  F32 sum[Vectors] = {};
  for (; entry < end; ++entry) {
    const float* from = values + int64_t(*entry & mask) * dim;
#pragma GCC unroll 4
    for (int k = 0; k < Vectors; ++k) sum[k] += load(from + k * kLanes);
  }
#pragma GCC unroll 4
  for (int k = 0; k < Vectors; ++k) store(sums + k * kLanes, sum[k]);
}

void sum(const SortedRows& sorted, const float* values, int64_t dim, int64_t begin, int64_t end,
         int64_t to, int64_t* rows, float* sums) {
  const int bits = sorted.position_bits;
  const uint64_t mask = (uint64_t(1) << bits) - 1;
  const uint64_t* const last = sorted.entries + sorted.count;
  const uint64_t* const stop = sorted.entries + end;
  const uint64_t* entry = sorted.entries + begin;
  while (entry > sorted.entries && entry < stop && *entry >> bits == entry[-1] >> bits) ++entry;
  const uint64_t* fetched = entry;
  while (entry < stop) {
    const uint64_t row = *entry >> bits;
    const uint64_t* next = entry + 1;
    while (next < last && *next >> bits == row) ++next;
    const uint64_t* const ahead = last - next > kAhead ? next + kAhead : last;
    for (; fetched < ahead; ++fetched) {
      const float* from = values + int64_t(*fetched & mask) * dim;
      for (int64_t d = 0; d < dim && d < 4 * kLine; d += kLine) __builtin_prefetch(from + d);
    }
    rows[to] = int64_t(row);
    float* out = sums + to * dim;
    int64_t d = 0;
    for (; d + 4 * kLanes <= dim; d += 4 * kLanes) {
      sum_columns<4>(entry, next, mask, values + d, dim, out + d);
    }
    for (; d + kLanes <= dim; d += kLanes) {
      sum_columns<1>(entry, next, mask, values + d, dim, out + d);
    }
    if (d < dim) {
      const int part = int(dim - d);
      F32 tail{};
      for (; entry < next; ++entry) {
        tail += load_part(values + int64_t(*entry & mask) * dim + d, part);
      }
      store_part(out + d, tail, part);
    }
    ++to;
    entry = next;
  }
}

}  // namespace

extern const MergeLoops merge_loops{&sum};

}  // namespace DQRM_LEVEL
}  // namespace dqrm
