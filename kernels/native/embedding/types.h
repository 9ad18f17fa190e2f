// What the loops over embedding tables are given. T tables, B samples, N ids, D columns.
#pragma once

#include <cstdint>

namespace dqrm {

// Widest row the loops take.
constexpr int kMaxDim = 1024;
// Rows under one bound, and nodes under one node above; see maxima.h.
constexpr int kFanout = 64;
constexpr int kFanoutBits = 6;
// Enough for 64^10 rows.
constexpr int kMaxBoundLevels = 10;

// What rows are kept in.
enum class Kind : int { fp32, bf16, int8, int4 };

// The rows of all tables, one after the other.
struct Storage {
  Kind kind;
  void* memory;
  int dim;
  int64_t row_bytes;
  int state_bytes;  // of an element of the optimizer's state
  uint64_t key;  // of this step's random bits, where rows are rounded
};

// Which scale a row is fake-quantized with.
enum class Grid : int { none, table, row };

// One table as it is now.
struct TableView {
  int64_t first_row;  // in the storage
  Grid grid;
  float largest;  // code
  float scale;    // Grid::table only
};

// Ids of one table, pooled into bags: bag b holds ids [offsets[b], offsets[b + 1]) of `ids`, or
// the one id b where there are no offsets.
struct Bags {
  const void* ids;  // int64_t if wide, else int32_t
  bool wide;
  bool mean;
  const int64_t* offsets;  // or null
  const float* weights;    // of each id, or null
  int64_t begin, end;      // ids of this table
};

// Where the bags of one table go: row b is at data + b * stride.
struct Output {
  float* data;
  int64_t stride;
  bool streamed;  // past the caches; rows are whole, aligned lines
};

// A distinct row of a table and the first and last id that asked for it.
struct TouchedRow {
  int64_t row;
  int32_t first, last;
};

// Distinct rows of one table and where their gradients are: those of a row are the gradients of
// ids first, next[first], ... until -1, where id k belongs to bag[k]. Null arrays: a row has one
// id, and id k is in bag k.
struct TouchedRows {
  const TouchedRow* rows;
  int64_t count;
  const int32_t* next;
  const int32_t* bag;
};

// Gradients of one table's bags: that of bag b is at data + b * stride.
struct BagGradient {
  const float* data;
  int64_t stride;
  const float* weights;    // of each id, or null
  const int64_t* offsets;  // for pooling by mean; else null
  bool clip;               // zero it where the weight lies outside the grid
};

// A tree of bounds over one table's rows; see maxima.h. levels = 0 where none is kept.
struct Bounds {
  float* level[kMaxBoundLevels];
  int levels;
  int32_t* unsettled;
};

enum class Rule : int { sgd, adagrad, adam };

// A step of an optimizer; the formulas are in update_loops.cpp.
struct RuleStep {
  Rule rule;
  float lr;
  float decay;  // lr * weight decay
  float eps;
  float beta1, beta1_rest, beta2, beta2_rest;
  float rate;  // lr / (1 - beta1^t)
  float root;  // 1 / sqrt(1 - beta2^t)
  // The state, float where rows are, else bfloat16.
  void* first;
  void* second;
};

}  // namespace dqrm
