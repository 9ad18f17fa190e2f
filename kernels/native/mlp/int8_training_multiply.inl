// Products of quads: the tile of int32 sums that stays in registers.
namespace dqrm {
namespace DQRM_LEVEL {
namespace {

constexpr int64_t kPanel = kInt8TrainingPanel;
constexpr int64_t kQuad = 4;
// Bytes of a panel's columns in one quad: two vectors.
constexpr int64_t kStep = kPanel * kQuad;
static_assert(kPanel == 2 * kLanes);

inline int64_t panels_of(int64_t columns) { return (columns + kPanel - 1) / kPanel; }
inline int64_t quads_of(int64_t values) { return (values + kQuad - 1) / kQuad; }
inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

inline I32 load_quads(const int8_t* from) { return I32(_mm512_loadu_si512(from)); }

inline I32 multiply_add(I32 unsigned_quads, I32 signed_quads, I32 sum) {
  return I32(_mm512_dpbusd_epi32(__m512i(sum), __m512i(unsigned_quads), __m512i(signed_quads)));
}

inline F32 to_float(I32 value) { return F32(_mm512_cvtepi32_ps(__m512i(value))); }

// -128 times the sum of every column of a panel.
void start_of(const int8_t* panel, int64_t steps, int32_t* start) {
  const I32 all128 = I32(_mm512_set1_epi8(char(0x80)));
  I32 low{}, high{};
  for (int64_t step = 0; step < steps; ++step, panel += kStep) {
    low = multiply_add(all128, load_quads(panel), low);
    high = multiply_add(all128, load_quads(panel + kStep / 2), high);
  }
  low = -low;
  high = -high;
  __builtin_memcpy(start, &low, sizeof low);
  __builtin_memcpy(start + kLanes, &high, sizeof high);
}

// The left operand: bytes of rows, `row` apart, a quad every `step`.
struct Left {
  const uint8_t* bytes;
  int64_t row;
  int64_t step;
};

// out = sum * (row_scale * column_scale) + add, for R rows of a panel.
struct Finish {
  const float* row_scale;
  const float* column_scale;  // [kPanel]
  const float* add;           // rows `add_row` apart
  int64_t add_row;
  float* out;                 // rows `out_row` apart
  int64_t out_row;
};

// For R rows and V vectors of columns; the sums of the others are zero.
template <int R, int V>
void multiply(int64_t steps, Left left, const int8_t* panel, const int32_t* start,
              const Finish& finish) {
  // One pointer for three rows: more would not fit the registers.
  constexpr int kPointers = (R + 2) / 3;
  const uint8_t* rows[kPointers];
  for (int i = 0; i < kPointers; ++i) rows[i] = left.bytes + 3 * i * left.row;
  I32 sums[R][V];
  for (int r = 0; r < R; ++r) {
    for (int v = 0; v < V; ++v) __builtin_memcpy(&sums[r][v], start + v * kLanes, sizeof(I32));
  }
  for (int64_t step = 0; step < steps; ++step) {
    I32 right[V];
    for (int v = 0; v < V; ++v) right[v] = load_quads(panel + v * (kStep / 2));
    panel += kStep;
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r) {
      int32_t quad;
      __builtin_memcpy(&quad, rows[r / 3] + r % 3 * left.row, sizeof quad);
      const I32 both = quad - I32{};
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) sums[r][v] = multiply_add(both, right[v], sums[r][v]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < kPointers; ++i) rows[i] += left.step;
  }
#pragma GCC unroll 2
  for (int v = 0; v < 2; ++v) {
    const F32 column_scale = load(finish.column_scale + v * kLanes);
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r) {
      const F32 sum = v < V ? to_float(sums[r][v < V ? v : 0]) : F32{};
      const F32 scale = all(finish.row_scale[r]) * column_scale;
      const F32 add = load(finish.add + r * finish.add_row + v * kLanes);
      store(finish.out + r * finish.out_row + v * kLanes, sum * scale + add);
    }
  }
}

using Multiply = void (*)(int64_t, Left, const int8_t*, const int32_t*, const Finish&);

template <int V, int... R>
struct Multiplies {
  static constexpr Multiply kOf[] = {multiply<R + 1, V>...};
};
template <int V, int... R>
Multiplies<V, R...> multiplies(std::integer_sequence<int, R...>);

// For `rows` rows and the columns of a panel that are used.
inline Multiply multiply_for(int64_t rows, int64_t columns) {
  using Counts = std::make_integer_sequence<int, int(kInt8TrainingRows)>;
  using One = decltype(multiplies<1>(Counts()));
  using Two = decltype(multiplies<2>(Counts()));
  return columns <= kLanes ? One::kOf[rows - 1] : Two::kOf[rows - 1];
}

constexpr float kOnes[kPanel] = {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1,
                                 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1};
constexpr float kZeros[kPanel] = {};

}  // namespace
}  // namespace DQRM_LEVEL
}  // namespace dqrm
