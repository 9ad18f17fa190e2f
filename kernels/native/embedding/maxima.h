// The largest magnitude of every table, exact after every update.
//
// Every block of 64 rows of a table has a bound on its magnitudes, and every 64 bounds one above
// them, up to a root: 4 bytes for 64 rows where a bound a row would take 4 bytes for each.
//
//     rows      | 64 rows | 64 rows | ... | the rest |      tables never share a block
//     level 0      bound     bound            bound         sign set: may be too high
//     level 1      largest magnitude of 64 bounds
//     ...
//     root         an upper bound, and exact if a bound equal to it is
//
// A row that grows past its block's bound raises it. A row that held the bound and changed only
// marks it, as finding the next largest would read the block. Once an update is through, a marked
// block is read only if the root may come from it (settle). Every mark is made by a touched row
// and cleared by reading one block, so an update costs O(touched rows), whatever the table's size.
//
// NaN is not compared and moves no bound; an infinite weight makes the root infinite.
#pragma once

#include <cstdint>
#include <vector>

#include "loops.h"
#include "types.h"

namespace dqrm {

class Maxima {
 public:
  explicit Maxima(int64_t rows);

  Bounds bounds();
  int64_t bytes() const;

  // The largest magnitude; first settles what an update left open.
  float settled(const Storage& storage, int64_t first_row, const LookupLoops& loops);

  // Sets the bounds of level 0 of one part of the blocks from the weights.
  void scan(const Storage& storage, int64_t first_row, const LookupLoops& loops, int64_t part,
            int64_t parts);
  // Sets the levels above after all parts were scanned.
  void finish_scan();

  // Takes in that a row was written with weights that were not seen before.
  void row_written(const Storage& storage, int64_t first_row, const LookupLoops& loops,
                   int64_t row);

 private:
  float block_max(const Storage& storage, int64_t first_row, const LookupLoops& loops,
                  int64_t block) const;
  void refresh_above(int64_t node, int level);
  float children_max(int64_t node, int level) const;

  int64_t rows_;
  int32_t unsettled_ = 0;
  std::vector<std::vector<float>> levels_;
};

}  // namespace dqrm
