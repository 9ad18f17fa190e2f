// The loops of gradient exchange, one table for every level; results are the same bits at all.
//
// Symbols: N rows, D values a row.
#pragma once

#include <cstdint>

#include "../common/level.h"

namespace dqrm {

enum class ScaleType : int { float32, bfloat16 };

// Rows as integer codes with a scale each; formulas in kernels/row_codecs.py. Row i has `dim`
// values at i * dim, but for the last, which has last_dim.
struct CodedRows {
  int64_t rows;
  int64_t dim;
  int64_t last_dim;
  int bits;  // 8 or 4; of float_loops 32 or 16
  ScaleType scale_type;
  uint8_t* codes;
  uint8_t* scales;
};

struct Rounding {
  bool stochastic;
  uint64_t key;
  const int64_t* numbers;  // of the rows; null: they count up from `first`
  int64_t first;
};

struct CodeLoops {
  // Encodes the rows [begin, end) of `values`; `residual`, unless null, becomes what the codes
  // lost, after it was added to the values where it is `carried`. Returns the first row that is not
  // finite, or `end`.
  int64_t (*encode)(const CodedRows& rows, const float* values, float* residual, bool carried,
                    const Rounding& rounding, int64_t begin, int64_t end);
  // Writes, or adds times `alpha`, rows [begin, end) to row i, or targets[i], of `out`.
  void (*decode)(const CodedRows& rows, float* out, const int64_t* targets, bool add, float alpha,
                 int64_t begin, int64_t end);
};

struct SignLoops {
  // residual += gradient; returns the sum of its magnitudes, or of its squares.
  double (*compensate)(const float* gradient, float* residual, int64_t count, bool squares);
  // residual -= scale * sign; one bit a sign, 1 where it was >= 0. `count` is a multiple of eight
  // except at the end of all values.
  void (*encode)(float* residual, int64_t count, float scale, uint8_t* bits);
  void (*decode)(const uint8_t* bits, int64_t count, float scale, float* out, bool add);
};

// Positions of equal rows, next to each other: the upper bits of an entry are the row, the lower
// `position_bits` where its values are.
struct SortedRows {
  const uint64_t* entries;
  int64_t count;
  int position_bits;
};

struct MergeLoops {
  // Sums the values of the rows that begin in [begin, end), the first becoming row `to` of the
  // result.
  void (*sum)(const SortedRows& sorted, const float* values, int64_t dim, int64_t begin,
              int64_t end, int64_t to, int64_t* rows, float* sums);
};

// How many values were selected, and the first that is not finite, or -1.
struct Selected {
  int64_t count;
  int64_t not_finite;
};

struct SelectLoops {
  // Writes the places of the first `room` values of at least the threshold's magnitude, and counts
  // all of them; stops at one that is not finite.
  Selected (*select)(const float* values, int64_t count, float threshold, int64_t room,
                     int64_t* indices);
};

// Of rows of 8 or 4 bits, and of rows of float32 or bfloat16, which have no scales.
DQRM_DECLARE_LOOPS(CodeLoops, code_loops)
DQRM_DECLARE_LOOPS(CodeLoops, float_loops)
DQRM_DECLARE_LOOPS(SignLoops, sign_loops)
DQRM_DECLARE_LOOPS(MergeLoops, merge_loops)
DQRM_DECLARE_LOOPS(SelectLoops, select_loops)

}  // namespace dqrm
