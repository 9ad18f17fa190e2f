// The dot interaction, forward and backward, a sample at a time.
//
// Forward transposes the vectors of a sample into scratch memory, so that one register holds the
// same value of neighbouring vectors j; a tile of rows i then needs one load and one broadcast a
// product, and its sums lie in memory order. Backward multiplies the triangle, read as the
// symmetric matrix it stands for, with the vectors.
#include "lanes.h"
#include "loops.h"

namespace dqrm {
namespace DQRM_LEVEL {
namespace {

constexpr int kTileRows = kLanes < 8 ? 4 : 8;
constexpr int kHalf = kLanes > 4 ? kLanes / 2 : kLanes;
constexpr int64_t kLine = 16;  // Floats in a cache line.

inline int64_t row_start(int64_t row, bool itself) {
  return row * (itself ? row + 1 : row - 1) / 2;
}

inline int64_t padded(int64_t vectors) { return (vectors + kLanes - 1) / kLanes * kLanes; }

inline void prefetch(const float* from, int64_t count) {
  for (int64_t i = 0; i < count; i += kLine) __builtin_prefetch(from + i);
}

// [F, D] to [D, padded F]; the padding repeats the last vector.
void transpose(const float* input, int64_t vectors, int64_t dim, float* transposed) {
  const int64_t stride = padded(vectors);
  for (int64_t first = 0; first < vectors; first += kLanes) {
    const float* rows[kLanes];
    for (int lane = 0; lane < kLanes; ++lane) {
      const int64_t row = first + lane < vectors ? first + lane : vectors - 1;
      rows[lane] = input + row * dim;
    }
    if (dim < 4) {
      for (int64_t d = 0; d < dim; ++d) {
        for (int lane = 0; lane < kLanes; ++lane) {
          transposed[d * stride + first + lane] = rows[lane][d];
        }
      }
      continue;
    }
    for (int64_t start = 0; start < dim; start += 4) {
      // The last four may overlap the ones before.
      const int64_t d = start + 4 <= dim ? start : dim - 4;
      F32 a = load_quads(rows, d);
      F32 b = load_quads(rows + 1, d);
      F32 c = load_quads(rows + 2, d);
      F32 e = load_quads(rows + 3, d);
      transpose_quads(a, b, c, e);
      float* to = transposed + d * stride + first;
      store(to, a);
      store(to + stride, b);
      store(to + 2 * stride, c);
      store(to + 3 * stride, e);
    }
  }
}

struct Triangle {
  float* start;
  float* end;
  bool itself;
};

// Products of the rows [row, row + Rows) with the vectors [column, column + Width); every row has a
// product there. A row that ends within the tile is stored whole as long as the triangle goes on:
// what it spills belongs to rows and columns that are written later.
template <int Rows, int Width>
void forward_tile(const float* transposed, int64_t stride, int64_t dim, int64_t row,
                  int64_t column, const Triangle& triangle) {
  Vector<Width> sums[Rows] = {};
  for (int64_t d = 0; d < dim; ++d, transposed += stride) {
    const Vector<Width> values = load<Width>(transposed + column);
    unrolled<Rows>([&](int r) {
      sums[r] = scaled_sum<Width>(transposed[row + r], values, sums[r]);
    });
  }
  const int64_t diagonal = triangle.itself ? 1 : 0;
  float* to = triangle.start + row_start(row, triangle.itself) + column;
  if (to + (Rows - 1) * (row + diagonal) + Rows * (Rows - 1) / 2 + Width <= triangle.end) {
    unrolled<Rows>([&](int r) {
      store<Width>(to, sums[r]);
      to += row + r + diagonal;
    });
    return;
  }
  float lanes[Rows][Width];
  unrolled<Rows>([&](int r) { store<Width>(lanes[r], sums[r]); });
  for (int r = 0; r < Rows; ++r) {
    const int64_t length = row + r + diagonal;
    const int64_t count = length - column < Width ? length - column : Width;
    for (int64_t lane = 0; lane < count; ++lane) to[lane] = lanes[r][lane];
    to += length;
  }
}

template <int Width>
void forward_rows(int64_t rows, const float* transposed, int64_t stride, int64_t dim, int64_t row,
                  int64_t column, const Triangle& triangle) {
  switch (rows) {
    case 1: return forward_tile<1, Width>(transposed, stride, dim, row, column, triangle);
    case 2: return forward_tile<2, Width>(transposed, stride, dim, row, column, triangle);
    case 3: return forward_tile<3, Width>(transposed, stride, dim, row, column, triangle);
    case 4: return forward_tile<4, Width>(transposed, stride, dim, row, column, triangle);
    case 5: return forward_tile<5, Width>(transposed, stride, dim, row, column, triangle);
    case 6: return forward_tile<6, Width>(transposed, stride, dim, row, column, triangle);
    case 7: return forward_tile<7, Width>(transposed, stride, dim, row, column, triangle);
    default: return forward_tile<8, Width>(transposed, stride, dim, row, column, triangle);
  }
}

void forward_sample(const float* input, const Interaction& work, float* output,
                    float* transposed) {
  const int64_t vectors = work.vectors, dim = work.dim;
  transpose(input, vectors, dim, transposed);
  int64_t d = 0;
  for (; d + kLanes <= dim; d += kLanes) store(output + d, load(input + d));
  for (; d < dim; ++d) output[d] = input[d];

  const int64_t stride = padded(vectors);
  const Triangle triangle{output + dim, output + dim + row_start(vectors, work.itself),
                          work.itself};
  const int64_t diagonal = work.itself ? 1 : 0;
  for (int64_t row = 1 - diagonal; row < vectors; row += kTileRows) {
    const int64_t rows = vectors - row < kTileRows ? vectors - row : kTileRows;
    const int64_t columns = row + rows - 1 + diagonal;
    // From right to left: what the tile on the diagonal spills, the others overwrite.
    int64_t column = (columns - 1) / kLanes * kLanes;
    if (columns - column <= kHalf) {
      forward_rows<kHalf>(rows, transposed, stride, dim, row, column, triangle);
      column -= kLanes;
    }
    for (; column >= 0; column -= kLanes) {
      forward_rows<kLanes>(rows, transposed, stride, dim, row, column, triangle);
    }
  }
}

int64_t scratch(const Interaction& work) { return work.dim * padded(work.vectors); }

void forward(const Interaction& work, int64_t begin, int64_t end, float* memory) {
  const float* input = work.input + begin * work.input_stride;
  float* output = work.output + begin * work.output_stride;
  for (int64_t sample = begin; sample < end; ++sample) {
    if (sample + 1 < end) prefetch(input + work.input_stride, work.vectors * work.dim);
    forward_sample(input, work, output, memory);
    input += work.input_stride;
    output += work.output_stride;
  }
}

// Rows a block of the backward holds sums of, by registers a row.
constexpr int kRegisters = kLanes == 16 ? 20 : 10;
constexpr int most_rows(int columns) { return kRegisters / columns < 9 ? kRegisters / columns : 9; }
constexpr int kMostColumns = kLanes == 16 ? 4 : 2;

struct BackwardSample {
  const float* vectors;  // [F, D]
  const float* grad;     // [D + pairs]
  float* output;         // [F, D]
  int64_t count;         // F
  int64_t dim;           // D
  bool itself;
};

// Gradients of the rows [row, row + Rows), columns [column, column + Columns * Width).
template <int Width, int Columns, int Rows>
void backward_block(const BackwardSample& work, int64_t row, int64_t column) {
  const float* triangle = work.grad + work.dim;
  const float* starts[Rows];
#pragma GCC unroll 9
  for (int r = 0; r < Rows; ++r) starts[r] = triangle + row_start(row + r, work.itself);
  Vector<Width> sums[Rows][Columns] = {};
  Vector<Width> values[Columns];
  const float* from = work.vectors + column;
  const auto next = [&] {
#pragma GCC unroll 4
    for (int c = 0; c < Columns; ++c) values[c] = load<Width>(from + c * Width);
    from += work.dim;
  };
  const auto add = [&](int r, float factor) {
#pragma GCC unroll 4
    for (int c = 0; c < Columns; ++c) {
      sums[r][c] = scaled_sum<Width>(factor, values[c], sums[r][c]);
    }
  };
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
    // The derivative of v * v is 2 v.
    if (work.itself) add(j, 2.0f * starts[j][row + j]);
  }
  const float* later = starts[Rows - 1] + row + Rows - 1 + (work.itself ? 1 : 0);
  for (int64_t j = row + Rows; j < work.count; ++j) {
    next();
#pragma GCC unroll 9
    for (int r = 0; r < Rows; ++r) add(r, later[row + r]);
    later += j + (work.itself ? 1 : 0);
  }
  float* to = work.output + row * work.dim + column;
#pragma GCC unroll 9
  for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 4
    for (int c = 0; c < Columns; ++c) store<Width>(to + r * work.dim + c * Width, sums[r][c]);
  }
}

template <int Width, int Columns, int Rows = most_rows(Columns)>
void backward_rows(int64_t rows, const BackwardSample& work, int64_t row, int64_t column) {
  if constexpr (Rows == 1) {
    backward_block<Width, Columns, 1>(work, row, column);
  } else if (rows == Rows) {
    backward_block<Width, Columns, Rows>(work, row, column);
  } else {
    backward_rows<Width, Columns, Rows - 1>(rows, work, row, column);
  }
}

template <int Width, int Columns>
void backward_columns(const BackwardSample& work, int64_t column) {
  // Blocks as equal as can be: 27 rows are three times 9, 28 are four times 7.
  const int64_t blocks = (work.count + most_rows(Columns) - 1) / most_rows(Columns);
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t row = work.count * block / blocks;
    backward_rows<Width, Columns>(work.count * (block + 1) / blocks - row, work, row, column);
  }
}

template <int Width>
void backward_sample(const BackwardSample& work) {
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
  for (int64_t d = 0; d < work.dim; ++d) work.output[d] += work.grad[d];
}

void backward(const Interaction& work, int64_t begin, int64_t end) {
  const int64_t pairs = row_start(work.vectors, work.itself);
  BackwardSample sample{work.input + begin * work.input_stride,
                        work.grad + begin * work.grad_stride,
                        work.output + begin * work.output_stride,
                        work.vectors,
                        work.dim,
                        work.itself};
  for (int64_t i = begin; i < end; ++i) {
    if (i + 1 < end) {
      prefetch(sample.vectors + work.input_stride, work.vectors * work.dim);
      prefetch(sample.grad + work.grad_stride, work.dim + pairs);
    }
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
