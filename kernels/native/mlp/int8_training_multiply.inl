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

// The left operand of y and dx: a quad is four neighbours of a row.
struct RowBytes {
  const uint8_t* bytes;
  int64_t row;
  static constexpr int64_t kNext = kQuad;
};

// That of dw: one of the columns of a panel of quads.
struct ColumnBytes {
  const uint8_t* bytes;
  static constexpr int64_t row = kQuad;
  static constexpr int64_t kNext = kStep;
};

// Rows of a tile. Few, so that two tiles fit the registers.
constexpr int64_t kTile = 4;

// Adds one quad of every row to V vectors of columns.
template <int V>
inline void add_products(I32 (&sums)[kTile][V], const uint8_t* const (&rows)[kTile],
                         int64_t offset, const int8_t* quads) {
  I32 right[V];
#pragma GCC unroll 2
  for (int v = 0; v < V; ++v) right[v] = load_quads(quads + v * (kStep / 2));
#pragma GCC unroll 4
  for (int r = 0; r < kTile; ++r) {
    int32_t quad;
    __builtin_memcpy(&quad, rows[r] + offset, sizeof quad);
    const I32 both = quad - I32{};
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) sums[r][v] = multiply_add(both, right[v], sums[r][v]);
  }
}

template <int V>
inline I32 second(const I32 (&sums)[V]) {
  if constexpr (V == 2) return sums[1];
  return I32{};
}

// Multiplies `count` rows with V vectors of a panel's columns and calls finish(row, low, high) with
// the sums of every row, those of columns that are not computed being zero; then finish.close().
//
// A tile is finished among the first products of the next one: their units are not the same, and
// the processor does not look far enough ahead to find the next products by itself.
template <int V, typename Left, typename Finish>
void multiply(int64_t steps, Left left, int64_t count, const int8_t* panel, const int32_t* start,
              const Finish& given) {
  // A copy that nothing it writes can change, and that stays in registers.
  Finish finish = given;
  I32 first[V];
  for (int v = 0; v < V; ++v) __builtin_memcpy(&first[v], start + v * kLanes, sizeof(I32));
  I32 done[kTile][V] = {};
  for (int64_t row = 0; row < count; row += kTile) {
    // Behind the last row, that row again.
    const uint8_t* rows[kTile];
    for (int r = 0; r < kTile; ++r) rows[r] = left.bytes + smaller(row + r, count - 1) * left.row;
    I32 sums[kTile][V];
    for (int r = 0; r < kTile; ++r) {
      for (int v = 0; v < V; ++v) sums[r][v] = first[v];
    }
    int64_t offset = 0;
    const int8_t* quads = panel;
    const int8_t* const end = panel + steps * kStep;
#pragma GCC unroll 4
    for (int r = 0; r < kTile; ++r) {
      if (quads < end) [[likely]] add_products<V>(sums, rows, offset, quads);
      offset += Left::kNext;
      quads += kStep;
      if (row > 0) [[likely]] finish(row - kTile + r, done[r][0], second(done[r]));
    }
    for (; quads < end; quads += kStep, offset += Left::kNext) {
      add_products<V>(sums, rows, offset, quads);
    }
    for (int r = 0; r < kTile; ++r) {
      for (int v = 0; v < V; ++v) done[r][v] = sums[r][v];
    }
  }
  const int64_t last = (count - 1) / kTile * kTile;
#pragma GCC unroll 4
  for (int r = 0; r < kTile; ++r) {
    if (last + r < count) finish(last + r, done[r][0], second(done[r]));
  }
  finish.close();
}

// For a panel of which `columns` are used.
template <typename Left, typename Finish>
inline void multiply_panel(int64_t columns, int64_t steps, Left left, int64_t count,
                           const int8_t* panel, const int32_t* start, const Finish& finish) {
  const auto product = columns <= kLanes ? multiply<1, Left, Finish> : multiply<2, Left, Finish>;
  product(steps, left, count, panel, start, finish);
}

}  // namespace
}  // namespace DQRM_LEVEL
}  // namespace dqrm
