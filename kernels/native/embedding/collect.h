// Distinct ids of one table and the order in which each occurs.
#pragma once

#include <cstdint>
#include <vector>

#include "types.h"

namespace dqrm {

// Finds the distinct rows among a table's ids. Made once per thread; its memory grows to the
// largest table it has seen.
class Collector {
 public:
  // The rows that part `part` of `parts` owns, in the order of their first id; an id belongs to
  // the owner of its block of kFanout rows. Valid until the next call.
  TouchedRows collect(const Bags& bags, int64_t batch, int64_t rows, int64_t part, int64_t parts);

  // As collect() of all rows, ascending.
  TouchedRows collect_sorted(const Bags& bags, int64_t batch, int64_t rows);

 private:
  template <typename Id>
  void by_address(const Id* ids, int64_t count, int64_t rows);
  template <typename Id, bool Owned>
  void by_hash(const Id* ids, int64_t count, int64_t part, int64_t parts);
  void fill_bags(const Bags& bags, int64_t batch);
  void add(int64_t row, int32_t id);
  void append(uint32_t slot, int32_t id);
  TouchedRows view(const Bags& bags) const;

  std::vector<uint32_t> slots_;  // number of a distinct row plus one, or zero
  std::vector<int64_t> row_;
  std::vector<int32_t> first_, last_, next_, bag_;
  std::vector<uint64_t> keys_, spare_;
  int64_t count_ = 0;
};

}  // namespace dqrm
