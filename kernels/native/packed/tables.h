// Packed tables of a model and look-ups in all of them at once.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "loops.h"

namespace dqrm {

class PackedTables {
 public:
  // The arrays of `tables` stay where they are and must outlive this.
  PackedTables(std::vector<PackedTable> tables, std::vector<std::string> names, int64_t dim,
               bool mean, Level level);

  // Checks and then looks up a batch of num_ids ids. Of `batch`, ids, offsets, weights, out and
  // their layout are given; the rest is filled in here. Nothing is written if anything is wrong.
  // Throws std::invalid_argument for offsets that do not describe the ids, std::out_of_range for
  // an id outside its table.
  void look_up(PackedBatch batch, int64_t num_ids, int threads) const;

  int64_t size() const { return int64_t(tables_.size()); }
  int64_t dim() const { return dim_; }
  bool mean() const { return mean_; }

 private:
  void check_offsets(const PackedBatch& batch, int64_t num_ids) const;
  void check_ids(const PackedBatch& batch) const;

  std::vector<PackedTable> tables_;
  std::vector<std::string> names_;
  int64_t dim_;
  bool mean_;
  const PackedLoops& loops_;
};

}  // namespace dqrm
