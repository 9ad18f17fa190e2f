// All tables of a collection: look up, update, and keep the tables' scales exact.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "collect.h"
#include "loops.h"
#include "maxima.h"
#include "types.h"

namespace dqrm {

// One table as it is described once.
struct TableSpec {
  std::string name;
  int64_t rows;
  float largest;  // code; 0 leaves the weights as they are
};

// An id outside its table.
struct OutsideTable {
  std::string message;
};

// The ids of all tables, table-major.
struct Lookups {
  const void* ids;
  bool wide;
  int64_t count;
  const int64_t* offsets;  // [T * B + 1] or null
  const float* weights;    // [count] or null
  int64_t batch;
};

// Distinct rows of all tables, ascending, and their summed gradients.
struct SummedGradient {
  std::vector<int64_t> rows;  // in the storage
  float* values = nullptr;    // [rows, dim]
};

class TableBatch {
 public:
  // storage and scales are read and written in place and must outlive this object.
  TableBatch(Storage storage, float* scales, std::vector<TableSpec> tables, bool by_row, bool mean,
             bool clip, bool exact, const LookupLoops& lookup, const UpdateLoops& update);

  int tables() const { return int(specs_.size()); }
  int dim() const { return storage_.dim; }
  Kind kind() const { return storage_.kind; }
  int64_t rows() const { return starts_.back(); }

  // Bytes that keeping the scales exact takes.
  int64_t maxima_bytes() const;

  // Throws OutsideTable or std::invalid_argument.
  void check(const Lookups& lookups) const;

  // Throws std::invalid_argument unless rows [count], in the storage, ascend without repeats.
  void check_ascending(const int64_t* rows, int64_t count) const;

  // The functions below expect lookups that check() let through. out: float [B, T, dim], any
  // distance between samples.
  void look_up(const Lookups& lookups, Output out, int threads) const;
  void update(const Lookups& lookups, const float* grad, int64_t stride, const RuleStep& step,
              int threads);
  SummedGradient row_gradient(const Lookups& lookups, const float* grad, int64_t stride,
                              int threads) const;

  // rows: int64 [count] that check_ascending() let through; values: float [count, dim].
  void apply(const int64_t* rows, int64_t count, const float* values, const RuleStep& step,
             int threads);

  // Sets what the random bits of the coming step are made from, where rows are rounded.
  void set_key(uint64_t key) { storage_.key = key; }

  // Writes values [count, dim] to distinct rows [count], in any order; what is kept about them is
  // not brought up to date. Throws std::invalid_argument.
  void write_rows(const int64_t* rows, int64_t count, const float* values, int threads);

  // Takes in that rows (any order) were written from outside. Throws std::invalid_argument.
  void rows_changed(const int64_t* rows, int64_t count);

  // Recomputes what is kept about the weights, and the scales, from all of them.
  void rebuild(int threads);

 private:
  TableView view(int table) const;
  Bags bags(const Lookups& lookups, int table) const;
  BagGradient gradient(const Lookups& lookups, const Bags& bags, int table, const float* grad,
                       int64_t stride) const;
  Bounds bounds(int table);
  Ahead ahead(int table, const RuleStep& step);
  void settle_scales();
  int table_of(int64_t row) const;
  void require_inside(const int64_t* rows, int64_t count) const;

  Storage storage_;
  float* scales_;
  std::vector<TableSpec> specs_;
  std::vector<int64_t> starts_;  // [T + 1]
  bool by_row_, mean_, clip_;
  const LookupLoops& lookup_;
  const UpdateLoops& update_;
  std::vector<std::optional<Maxima>> maxima_;  // of tables whose scale is kept exact
};

}  // namespace dqrm
