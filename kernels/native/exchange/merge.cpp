#include "merge.h"

#include <algorithm>
#include <bit>
#include <stdexcept>
#include <string>
#include <vector>

#include "../common/parallel.h"

namespace dqrm {
namespace {

// Rows that one thread sorts in about 50 microseconds: fewer are not worth a second thread.
constexpr int64_t kRowsPerPart = 16384;
// Bits of a digit: its counts and the lines that are written to fit the second cache. A few rows are
// not worth that many counts.
constexpr int kMostDigitBits = 13, kLeastDigitBits = 8;

int bits_of(uint64_t largest) { return largest == 0 ? 1 : int(std::bit_width(largest)); }

struct Split {
  int threads;
  int64_t parts;
  int64_t count;

  int64_t begin(int64_t part) const { return count * part / parts; }

  template <typename Function>
  void run(Function function) const {
    auto part = [&](int64_t number) { function(number, begin(number), begin(number + 1)); };
    parallel_for(threads, parts, part);
  }
};

// One pass of a least-significant-digit radix sort (Knuth, The Art of Computer Programming 3,
// 5.2.5); entries with equal digits keep their order.
void sort_by_digit(const Split& split, const uint64_t* from, uint64_t* to, int shift, int bits,
                   std::vector<uint32_t>& counts) {
  const size_t digits = size_t(1) << bits;
  const uint64_t mask = digits - 1;
  // Two counts of every digit in turns: runs of one digit would wait for each other.
  counts.assign(2 * digits * size_t(split.parts), 0);
  uint32_t* const first = counts.data();
  split.run([=](int64_t part, int64_t begin, int64_t end) {
    uint32_t* own = first + size_t(part) * 2 * digits;
    for (int64_t i = begin; i + 1 < end; i += 2) {
      ++own[from[i] >> shift & mask];
      ++own[digits + (from[i + 1] >> shift & mask)];
    }
    if ((end - begin) % 2 != 0) ++own[from[end - 1] >> shift & mask];
  });
  uint32_t before = 0;
  for (size_t digit = 0; digit < digits; ++digit) {
    for (size_t part = 0; part < size_t(split.parts); ++part) {
      uint32_t* own = first + part * 2 * digits + digit;
      const uint32_t count = own[0] + own[digits];
      own[0] = before;
      before += count;
    }
  }
  split.run([=](int64_t part, int64_t begin, int64_t end) {
    uint32_t* own = first + size_t(part) * 2 * digits;
    for (int64_t i = begin; i < end; ++i) to[own[from[i] >> shift & mask]++] = from[i];
  });
}

// Memory that grows to the largest batch and is kept.
struct Scratch {
  std::vector<uint64_t> entries, spare;
  std::vector<uint32_t> counts;
};

// Bits that the largest row needs.
int row_bits_of(const RowValues& input) {
  int64_t seen = 0;
  for (int64_t i = 0; i < input.count; ++i) seen |= input.rows[i];
  if (seen < 0) {
    const int64_t* at = std::find_if(input.rows, input.rows + input.count,
                                     [](int64_t row) { return row < 0; });
    throw std::invalid_argument("rows: " + std::to_string(*at) + " at position " +
                                std::to_string(at - input.rows) + " is negative");
  }
  return bits_of(uint64_t(seen));
}

}  // namespace

int64_t merge_rows(const MergeLoops& loops, const RowValues& input, int64_t* rows, float* sums,
                   int threads) {
  if (input.count == 0) return 0;
  const int row_bits = row_bits_of(input);
  const int position_bits = bits_of(uint64_t(input.count - 1));
  if (row_bits + position_bits > 64 || position_bits > 32) {
    throw std::invalid_argument("rows: " + std::to_string(input.count) + " rows below 2^" +
                                std::to_string(row_bits) + " do not fit a 64-bit sorting key");
  }
  thread_local Scratch scratch;
  const size_t size = size_t(input.count);
  if (scratch.entries.size() < size) {
    scratch.entries.resize(size);
    scratch.spare.resize(size);
  }
  uint64_t* entries = scratch.entries.data();
  uint64_t* spare = scratch.spare.data();
  const int64_t parts =
      std::clamp<int64_t>(input.count / kRowsPerPart, 1, std::max(threads, 1));
  const Split split{threads, parts, input.count};

  split.run([=](int64_t, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      entries[i] = uint64_t(input.rows[i]) << position_bits | uint64_t(i);
    }
  });
  const int most = std::clamp(position_bits - 3, kLeastDigitBits, kMostDigitBits);
  const int passes = (row_bits + most - 1) / most;
  for (int pass = 0, done = 0; pass < passes; ++pass) {
    const int bits = (row_bits - done) / (passes - pass);
    sort_by_digit(split, entries, spare, position_bits + done, bits, scratch.counts);
    std::swap(entries, spare);
    done += bits;
  }

  std::vector<int64_t> firsts(size_t(parts) + 1);
  split.run([&](int64_t part, int64_t begin, int64_t end) {
    int64_t distinct = begin == 0 ? 1 : 0;
    for (int64_t i = std::max<int64_t>(begin, 1); i < end; ++i) {
      distinct += entries[i] >> position_bits != entries[i - 1] >> position_bits;
    }
    firsts[size_t(part) + 1] = distinct;
  });
  for (size_t part = 0; part < size_t(parts); ++part) firsts[part + 1] += firsts[part];
  const SortedRows sorted{entries, input.count, position_bits};
  split.run([&](int64_t part, int64_t begin, int64_t end) {
    loops.sum(sorted, input.values, input.dim, begin, end, firsts[size_t(part)], rows, sums);
  });
  return firsts.back();
}

}  // namespace dqrm
