// Row-sparse gradients as messages: packed row numbers, then scales, then codes.
#pragma once

#include <vector>

#include "keys.h"
#include "loops.h"

namespace dqrm {

struct RowFormat {
  int64_t dim;
  int bits;  // 32, 16 (bfloat16), 8 or 4; the last two have a bfloat16 scale a row
  RowStride stride;

  int64_t code_bytes() const { return (dim * bits + 7) / 8; }
  int64_t row_bytes() const { return code_bytes() + (bits <= 8 ? 2 : 0); }
};

// Rows that ascend without repeats, and further ones that ascend among themselves and are none of
// them: number i counts through both.
struct RowParts {
  const int64_t* rows;
  const float* values;  // [count, dim]
  int64_t count;
  const int64_t* more_rows;
  const float* more_values;  // [more_count, dim]
  int64_t more_count;

  int64_t all() const { return count + more_count; }
  int64_t row(int64_t i) const { return i < count ? rows[i] : more_rows[i - count]; }
  const float* value(int64_t i, int64_t dim) const {
    return i < count ? values + i * dim : more_values + (i - count) * dim;
  }
};

// Where the residuals of rows are kept.
struct RowResiduals {
  const int64_t* slots;  // [count], -1 for none; null: no row has one
  float* values;         // [slots, dim]
};

// Writes the numbers of all rows in ascending order, grouped by row % groups, and how many each
// group has.
void order_rows(const RowParts& parts, int64_t groups, int64_t* order, int64_t* counts);

struct Encoded {
  int64_t bytes;       // -1: the rows do not ascend, or have another remainder than the stride's
  int64_t not_finite;  // the first row number with NaN or infinity, or -1
};

// Encodes the rows `order` [picked], or all of `parts` where it is null, into `to`, which has room
// for packed_keys_bound(picked) + picked * row_bytes(). A row with a slot is compensated by its
// residual, rounded to nearest, and leaves there what was lost. Others are rounded as `rounding`
// says and their loss is forgotten.
Encoded encode_row_message(const CodeLoops& loops, const RowFormat& format, const RowParts& parts,
                           const int64_t* order, int64_t picked, const RowResiduals& residuals,
                           const Rounding& rounding, uint8_t* to, int threads);

// One message of a merge.
struct RowPayload {
  const uint8_t* bytes;
  int64_t size;
  int64_t count;
  int64_t offset;  // of its stride
};

// Writes the union of the rows of all messages, ascending, and alpha times the sum of their values,
// added in the order of the messages; room for all rows of all messages is needed. Returns how many
// there are, or -1 - i where message i does not hold what it should.
int64_t merge_row_messages(const CodeLoops& loops, const RowFormat& format,
                           const std::vector<RowPayload>& payloads, int64_t limit, float alpha,
                           int64_t* rows, float* values, int threads);

}  // namespace dqrm
