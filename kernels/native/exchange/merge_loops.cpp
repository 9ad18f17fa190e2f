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
inline void sum_columns(const SortedRows& sorted, const float* values, int64_t dim, int64_t begin,
                        int64_t end, uint64_t mask, float* sums) {
  F32 sum[Vectors] = {};
  for (int64_t i = begin; i < end; ++i) {
    const float* from = values + int64_t(sorted.entries[i] & mask) * dim;
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
  const auto row_of = [&](int64_t i) { return sorted.entries[i] >> bits; };
  int64_t i = begin;
  while (i > 0 && i < end && row_of(i) == row_of(i - 1)) ++i;
  int64_t fetched = i;
  while (i < end) {
    int64_t next = i + 1;
    while (next < sorted.count && row_of(next) == row_of(i)) ++next;
    for (const int64_t ahead = next + kAhead; fetched < ahead && fetched < sorted.count; ++fetched) {
      const float* from = values + int64_t(sorted.entries[fetched] & mask) * dim;
      for (int64_t d = 0; d < dim && d < 4 * kLine; d += kLine) __builtin_prefetch(from + d);
    }
    rows[to] = int64_t(row_of(i));
    float* out = sums + to * dim;
    int64_t d = 0;
    for (; d + 4 * kLanes <= dim; d += 4 * kLanes) {
      sum_columns<4>(sorted, values + d, dim, i, next, mask, out + d);
    }
    for (; d + kLanes <= dim; d += kLanes) {
      sum_columns<1>(sorted, values + d, dim, i, next, mask, out + d);
    }
    if (d < dim) {
      const int part = int(dim - d);
      F32 tail{};
      for (int64_t k = i; k < next; ++k) {
        tail += load_part(values + int64_t(sorted.entries[k] & mask) * dim + d, part);
      }
      store_part(out + d, tail, part);
    }
    ++to;
    i = next;
  }
}

}  // namespace

extern const MergeLoops merge_loops{&sum};

}  // namespace DQRM_LEVEL
}  // namespace dqrm
