// The dot interaction, forward and backward, a sample at a time.
//
// Forward transposes the vectors of a sample into scratch memory, so that one register holds the
// same value of neighbouring vectors j; a tile of rows i then needs one load and one broadcast a
// product, and its sums lie in memory order. Backward multiplies the triangle, read as the
// symmetric matrix it stands for, with the vectors. Samples follow each other in memory: asking for
// the next one ahead of the processor's own prefetcher cost more than it gained (a tenth).
#include "lanes.h"
#include "loops.h"

namespace dqrm {
namespace DQRM_LEVEL {
namespace {

constexpr int kTileRows = kLanes < 8 ? 4 : 8;
// With so few rows, two columns of registers a tile keep the processor busy.
constexpr int kFewRows = 3;
constexpr int kHalf = kLanes > 4 ? kLanes / 2 : kLanes;

inline int64_t row_start(int64_t row, bool itself) {
  return row * (itself ? row + 1 : row - 1) / 2;
}

inline int64_t padded(int64_t vectors) { return (vectors + kLanes - 1) / kLanes * kLanes; }

// Transposes a [vectors, dim] matrix into columns of one with rows `stride` apart; vectors >= Width
// and dim >= 4.
template <int Width>
void transpose_blocks(const float* input, int64_t vectors, int64_t dim, float* transposed,
                      int64_t stride) {
  for (int64_t start = 0; start < vectors; start += Width) {
    // The last block of vectors may overlap the one before, as may the last four values.
    const int64_t first = start + Width <= vectors ? start : vectors - Width;
    for (int64_t at = 0; at < dim; at += 4) {
      const int64_t d = at + 4 <= dim ? at : dim - 4;
      transpose_block<Width>(input + first * dim + d, dim, transposed + d * stride + first, stride);
    }
  }
}

void transpose(const float* input, int64_t vectors, int64_t dim, float* transposed,
               int64_t stride) {
  if (vectors < 4 || dim < 4) {
    for (int64_t i = 0; i < vectors; ++i) {
      for (int64_t d = 0; d < dim; ++d) transposed[d * stride + i] = input[i * dim + d];
    }
  } else if (vectors >= kLanes) {
    transpose_blocks<kLanes>(input, vectors, dim, transposed, stride);
  } else if (vectors >= kHalf) {
    transpose_blocks<kHalf>(input, vectors, dim, transposed, stride);
  } else {
    transpose_blocks<4>(input, vectors, dim, transposed, stride);
  }
}

struct Triangle {
  float* start;
  float* end;
  bool itself;
};

// Products of the rows [row, row + Rows) with the vectors [column, column + Columns * Width); every
// row has a product with the last Width of them. A row that ends within the tile is stored whole as
// long as the triangle goes on: what it spills belongs to rows and columns that are written later.
template <int Rows, int Width, int Columns>
void forward_tile(const float* transposed, int64_t stride, int64_t dim, int64_t row,
                  int64_t column, const Triangle& triangle) {
  Vector<Width> sums[Columns][Rows] = {};
  for (int64_t d = 0; d < dim; ++d, transposed += stride) {
    unrolled<Columns>([&](int c) {
      const Vector<Width> values = load<Width>(transposed + column + c * Width);
      unrolled<Rows>([&](int r) {
        sums[c][r] = scaled_sum<Width>(transposed[row + r], values, sums[c][r]);
      });
    });
  }
  const int64_t diagonal = triangle.itself ? 1 : 0;
  float* const first = triangle.start + row_start(row, triangle.itself) + column;
  float* to = first + (Columns - 1) * Width;
  if (to + (Rows - 1) * (row + diagonal) + Rows * (Rows - 1) / 2 + Width <= triangle.end) {
    unrolled<Rows>([&](int r) {
      store<Width>(to, sums[Columns - 1][r]);
      to += row + r + diagonal;
    });
  } else {
    float lanes[Rows][Width];
    unrolled<Rows>([&](int r) { store<Width>(lanes[r], sums[Columns - 1][r]); });
    for (int r = 0; r < Rows; ++r) {
      if (to + Width <= triangle.end) {
        __builtin_memcpy(to, lanes[r], sizeof lanes[r]);
      } else {
        copy_few(to, lanes[r], row + r + diagonal - column - (Columns - 1) * Width);
      }
      to += row + r + diagonal;
    }
  }
  if constexpr (Columns == 2) {
    to = first;
    unrolled<Rows>([&](int r) {
      store<Width>(to, sums[0][r]);
      to += row + r + diagonal;
    });
  }
}

template <int Width, int Columns, int Rows = Columns == 2 ? kFewRows : kTileRows>
void forward_rows(int64_t rows, const float* transposed, int64_t stride, int64_t dim, int64_t row,
                  int64_t column, const Triangle& triangle) {
  if constexpr (Rows == 1) {
    forward_tile<1, Width, Columns>(transposed, stride, dim, row, column, triangle);
  } else if (rows == Rows) {
    forward_tile<Rows, Width, Columns>(transposed, stride, dim, row, column, triangle);
  } else {
    forward_rows<Width, Columns, Rows - 1>(rows, transposed, stride, dim, row, column, triangle);
  }
}

void forward_sample(const float* input, const Interaction& work, float* output,
                    float* transposed) {
  const int64_t vectors = work.vectors, dim = work.dim;
  const int64_t stride = padded(vectors);
  transpose(input, vectors, dim, transposed, stride);
  int64_t d = 0;
  for (; d + kLanes <= dim; d += kLanes) store(output + d, load(input + d));
  for (; d < dim; ++d) output[d] = input[d];

  const Triangle triangle{output + dim, output + dim + row_start(vectors, work.itself),
                          work.itself};
  const int64_t diagonal = work.itself ? 1 : 0;
  for (int64_t row = 1 - diagonal; row < vectors; row += kTileRows) {
    const int64_t rows = vectors - row < kTileRows ? vectors - row : kTileRows;
    const int64_t columns = row + rows - 1 + diagonal;
    // From right to left: what the tile on the diagonal spills, the others overwrite.
    int64_t column = (columns - 1) / kLanes * kLanes;
    if (rows <= kFewRows) {
      for (; column >= kLanes; column -= 2 * kLanes) {
        forward_rows<kLanes, 2>(rows, transposed, stride, dim, row, column - kLanes, triangle);
      }
    } else if (columns - column <= kHalf) {
      forward_rows<kHalf, 1>(rows, transposed, stride, dim, row, column, triangle);
      column -= kLanes;
    }
    for (; column >= 0; column -= kLanes) {
      forward_rows<kLanes, 1>(rows, transposed, stride, dim, row, column, triangle);
    }
  }
}

// Beyond the last vector the transposed matrix is never written: it has to come in as zeros, since
// leftover numbers could be slow to multiply.
int64_t scratch(const Interaction& work) { return work.dim * padded(work.vectors); }

void forward(const Interaction& work, int64_t begin, int64_t end, float* memory) {
  const float* input = work.input + begin * work.input_stride;
  float* output = work.output + begin * work.output_stride;
  for (int64_t sample = begin; sample < end; ++sample) {
    forward_sample(input, work, output, memory);
    input += work.input_stride;
    output += work.output_stride;
  }
}

// Vectors of sums a block of the backward holds, and the rows and columns they are of.
constexpr int kSums = kLanes == 16 ? 20 : 10;
constexpr int kMostColumns = kLanes == 16 ? 4 : 2;
constexpr int most_rows(int columns) { return kSums / columns < 9 ? kSums / columns : 9; }

struct Backward {
  const float* vectors;  // [F, D]
  const float* grad;     // [D + pairs]
  float* output;         // [F, D]
  int64_t count;         // F
  int64_t dim;           // D
  bool itself;
};

// Gradients of the rows [row, row + Rows), columns [column, column + Columns * Width).
template <int Width, int Columns, int Rows>
void backward_block(const Backward& work, int64_t row, int64_t column) {
  const int64_t dim = work.dim, diagonal = work.itself ? 1 : 0;
  const float* starts[Rows];
  starts[0] = work.grad + dim + row_start(row, work.itself);
#pragma GCC unroll 9
  for (int r = 1; r < Rows; ++r) starts[r] = starts[r - 1] + row + r - 1 + diagonal;
  Vector<Width> sums[Rows][Columns] = {};
  Vector<Width> values[Columns];
  const float* from = work.vectors + column;
  const auto next = [&] {
#pragma GCC unroll 4
    for (int c = 0; c < Columns; ++c) values[c] = load<Width>(from + c * Width);
    from += dim;
  };
  const auto add = [&](int r, float factor) {
#pragma GCC unroll 4
    for (int c = 0; c < Columns; ++c) {
      sums[r][c] = scaled_sum<Width>(factor, values[c], sums[r][c]);
    }
  };
  if (row == 0) {
    // The dense vector was copied as well as multiplied.
#pragma GCC unroll 4
    for (int c = 0; c < Columns; ++c) sums[0][c] = load<Width>(work.grad + column + c * Width);
  }
  for (int64_t j = 0; j < row; ++j) {
    next();
#pragma GCC unroll 9
    for (int r = 0; r < Rows; ++r) add(r, starts[r][j]);
  }
#pragma GCC unroll 9
  for (int j = 0; j < Rows; ++j) {
    next();
#pragma GCC unroll 9
    for (int r = 0; r < Rows; ++r) {
      if (r > j) add(r, starts[r][row + j]);
      if (r < j) add(r, starts[j][row + r]);
    }
  }
  const float* later = starts[Rows - 1] + row + Rows - 1 + diagonal;
  for (int64_t j = row + Rows; j < work.count; ++j) {
    next();
#pragma GCC unroll 9
    for (int r = 0; r < Rows; ++r) add(r, later[row + r]);
    later += j + diagonal;
  }
  if (work.itself) {
    // The derivative of v * v is 2 v.
    from = work.vectors + row * dim + column;
#pragma GCC unroll 9
    for (int r = 0; r < Rows; ++r) {
      next();
      add(r, 2.0f * starts[r][row + r]);
    }
  }
  float* to = work.output + row * dim + column;
#pragma GCC unroll 9
  for (int r = 0; r < Rows; ++r, to += dim) {
#pragma GCC unroll 4
    for (int c = 0; c < Columns; ++c) store<Width>(to + c * Width, sums[r][c]);
  }
}

template <int Width, int Columns, int Rows = most_rows(Columns)>
void backward_rows(int64_t rows, const Backward& work, int64_t row, int64_t column) {
  if constexpr (Rows == 1) {
    backward_block<Width, Columns, 1>(work, row, column);
  } else if (rows == Rows) {
    backward_block<Width, Columns, Rows>(work, row, column);
  } else {
    backward_rows<Width, Columns, Rows - 1>(rows, work, row, column);
  }
}

template <int Width, int Columns>
void backward_columns(const Backward& work, int64_t column) {
  // Blocks as equal as can be: 27 rows are three times 9, 28 are four times 7.
  int64_t blocks = (work.count + most_rows(Columns) - 1) / most_rows(Columns);
  for (int64_t row = 0; blocks > 0; --blocks) {
    const int64_t rows = (work.count - row) / blocks;
    backward_rows<Width, Columns>(rows, work, row, column);
    row += rows;
  }
}

template <int Width>
void backward_sample(const Backward& work) {
  int64_t column = 0;
  if constexpr (Width == kLanes) {
    for (; column + kMostColumns * Width <= work.dim; column += kMostColumns * Width) {
      backward_columns<Width, kMostColumns>(work, column);
    }
    for (; column + 2 * Width <= work.dim; column += 2 * Width) {
      backward_columns<Width, 2>(work, column);
    }
  }
  for (; column < work.dim; column += Width) {
    // The last columns may overlap the ones before: sums are the same.
    backward_columns<Width, 1>(work, column + Width <= work.dim ? column : work.dim - Width);
  }
}

void backward(const Interaction& work, int64_t begin, int64_t end) {
  Backward sample{work.input + begin * work.input_stride,
                  work.grad + begin * work.grad_stride,
                  work.output + begin * work.output_stride,
                  work.vectors,
                  work.dim,
                  work.itself};
  for (int64_t i = begin; i < end; ++i) {
    if (work.dim >= kLanes) {
      backward_sample<kLanes>(sample);
    } else if (work.dim >= kHalf) {
      backward_sample<kHalf>(sample);
    } else if (work.dim >= 4) {
      backward_sample<4>(sample);
    } else {
      backward_sample<1>(sample);
    }
    sample.vectors += work.input_stride;
    sample.grad += work.grad_stride;
    sample.output += work.output_stride;
  }
}

}  // namespace

extern const InteractionLoops interaction_loops{&scratch, &forward, &backward};

}  // namespace DQRM_LEVEL
}  // namespace dqrm
