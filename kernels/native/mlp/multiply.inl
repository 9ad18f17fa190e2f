// Products of operands: columns of a panel, and the tile of sums that stays in registers.
namespace dqrm {
namespace DQRM_LEVEL {
namespace {

constexpr int64_t kPanel = 2 * kLanes;

inline int64_t panels_of(int64_t columns) { return (columns + kPanel - 1) / kPanel; }
inline int64_t units_of(int64_t columns) { return (columns + kUnit - 1) / kUnit; }
inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

inline U32 load_vector(const uint32_t* from) {
  U32 value;
  __builtin_memcpy(&value, from, sizeof value);
  return value;
}

inline void store_vector(uint32_t* to, U32 value) { __builtin_memcpy(to, &value, sizeof value); }

// The first `count` lanes, zero in the others.
inline F32 load_part(const float* from, int64_t count) {
  if (count >= kLanes) return load(from);
  if (count <= 0) return F32{};
#if defined(__AVX512F__)
  return F32(_mm512_maskz_loadu_ps(__mmask16((1u << count) - 1), from));
#else
  F32 value{};
  __builtin_memcpy(&value, from, size_t(count) * sizeof(float));
  return value;
#endif
}

inline void store_part(float* to, F32 value, int64_t count) {
  if (count >= kLanes) return store(to, value);
  if (count <= 0) return;
#if defined(__AVX512F__)
  _mm512_mask_storeu_ps(to, __mmask16((1u << count) - 1), __m512(value));
#else
  __builtin_memcpy(to, &value, size_t(count) * sizeof(float));
#endif
}

inline Columns load_columns(const float* from, int64_t count) {
  return {load_part(from, count), load_part(from + kLanes, count - kLanes)};
}

inline void store_columns(float* to, Columns value, int64_t count) {
  store_part(to, value.low, count);
  store_part(to + kLanes, value.high, count - kLanes);
}

// Zero from column `count` on: what an unused column holds must not be a NaN times zero.
inline Columns cut(Columns value, int64_t count) {
  if (count >= kPanel) return value;
  float columns[kPanel];
  store(columns, value.low);
  store(columns + kLanes, value.high);
  return load_columns(columns, count);
}

// c = a b for R rows and V vectors of columns.
template <int R, int V>
void multiply(int64_t steps, const uint32_t* a, int64_t a_row, int64_t a_step, const uint32_t* b,
              int64_t b_step, Lane* c, int64_t c_row) {
  // One pointer for three rows: more would not fit the registers.
  constexpr int kPointers = (R + 2) / 3;
  const uint32_t* rows[kPointers];
  for (int i = 0; i < kPointers; ++i) rows[i] = a + 3 * i * a_row;
  Sum sums[R][V] = {};
  for (int64_t step = 0; step < steps; ++step) {
    U32 right[V];
    for (int v = 0; v < V; ++v) right[v] = load_vector(b + v * kLanes);
    b += b_step;
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r) {
      const U32 left = rows[r / 3][r % 3 * a_row] - U32{};
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) sums[r][v] = multiply_add(left, right[v], sums[r][v]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < kPointers; ++i) rows[i] += a_step;
  }
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) {
      __builtin_memcpy(c + r * c_row + v * kLanes, &sums[r][v], sizeof(Sum));
    }
  }
}

using Multiply = void (*)(int64_t, const uint32_t*, int64_t, int64_t, const uint32_t*, int64_t,
                          Lane*, int64_t);

template <int V, int... R>
struct Multiplies {
  static constexpr Multiply kOf[] = {multiply<R + 1, V>...};
};
template <int V, int... R>
Multiplies<V, R...> multiplies(std::integer_sequence<int, R...>);

// For `rows` rows and the columns of a panel that are used.
inline Multiply multiply_for(int64_t rows, int64_t columns) {
  using Counts = std::make_integer_sequence<int, kRows>;
  using One = decltype(multiplies<1>(Counts()));
  using Two = decltype(multiplies<2>(Counts()));
  return columns <= kLanes ? One::kOf[rows - 1] : Two::kOf[rows - 1];
}

// Passes over the panels of an operand that stay in the second-level cache, so that all rows meet
// them before the next ones are read.
constexpr int64_t kGroupUnits = 64 * 1024;

// Multiplies `count` rows, left_row units apart, with all panels, and calls
// write(tile[rows][kPanel], row, rows, panel) for every tile of the product.
template <typename Write>
void product(const uint32_t* left, int64_t left_row, int64_t count, int64_t steps,
             const uint32_t* panels, int64_t columns, Write write) {
  // A panel of one vector leaves the rest zero.
  alignas(64) Lane tile[kRows * kPanel] = {};
  const int64_t panel_units = steps * kPanel;
  const int64_t group = kGroupUnits / panel_units > 0 ? kGroupUnits / panel_units : 1;
  const int64_t all_panels = panels_of(columns);
  for (int64_t first = 0; first < all_panels; first += group) {
    const int64_t last = smaller(first + group, all_panels);
    for (int64_t row = 0; row < count; row += kRows) {
      const int64_t rows = smaller(kRows, count - row);
      for (int64_t panel = first; panel < last; ++panel) {
        multiply_for(rows, columns - panel * kPanel)(steps, left + row * left_row, left_row, 1,
                                                     panels + panel * panel_units, kPanel, tile,
                                                     kPanel);
        write(tile, row, rows, panel);
      }
    }
  }
}

}  // namespace
}  // namespace DQRM_LEVEL
}  // namespace dqrm
