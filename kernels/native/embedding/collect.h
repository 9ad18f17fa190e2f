// Distinct ids of one table and the order in which each occurs.
#pragma once

#include <cstdint>
#include <vector>

#include "types.h"

namespace dqrm {

// Memory that an update of a row will need; asked for while ids are still being collected, so that
// it arrives meanwhile. Row `row` of one table has `bytes` at base + row * bytes.
struct RowMemory {
  const char* base;
  int64_t bytes;
};
constexpr int kMaxRowMemories = 3;
struct Ahead {
  RowMemory memory[kMaxRowMemories];
  int count;
  const float* bounds;  // a number for each block, or null
};

// Finds the distinct rows among a table's ids. Made once per thread; its memory grows to the
// largest table it has seen.
class Collector {
 public:
  // The rows that part `part` of `parts` owns, in the order of their first id; an id belongs to
  // the owner of its block of kFanout rows. Valid until the next call.
  TouchedRows collect(const Bags& bags, int64_t batch, int64_t rows, int64_t part, int64_t parts,
                      const Ahead& ahead);

  // As collect() of all rows, ascending.
  TouchedRows collect_sorted(const Bags& bags, int64_t batch, int64_t rows);

 private:
  template <int Memories, typename Id>
  void by_address(const Id* ids, int64_t count, int64_t rows, const Ahead& ahead);
  template <int Memories, bool Owned, typename Id>
  void by_hash(const Id* ids, int64_t count, int64_t part, int64_t parts, const Ahead& ahead);
  template <int Memories>
  void add(int64_t row, int32_t id, const Ahead& ahead);
  void append(uint32_t number, int32_t id);
  void fill_bags(const Bags& bags, int64_t batch);
  TouchedRows view(const Bags& bags) const;

  std::vector<uint32_t> slots_;  // number of a distinct row plus one, or zero
  std::vector<TouchedRow> rows_, spare_;
  std::vector<uint32_t> starts_;  // of the digits of a sort
  std::vector<int32_t> next_, bag_;
  int64_t count_ = 0;
};

}  // namespace dqrm
