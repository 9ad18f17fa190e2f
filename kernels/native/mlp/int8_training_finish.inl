// What becomes of the sums of a panel, row by row.
namespace dqrm {
namespace DQRM_LEVEL {
namespace {

// Where columns of rows are written: as far as `count` of them are used.
struct RowsOut {
  float* values;  // rows `row` apart
  int64_t row;
  __mmask16 low;
  __mmask16 high;

  RowsOut(float* at, int64_t apart, int64_t count)
      : values(at), row(apart), low(lanes(count)), high(lanes(count - kLanes)) {}

  void store(int64_t number, Columns value) const {
    float* to = values + number * row;
    _mm512_mask_storeu_ps(to, low, __m512(value.low));
    _mm512_mask_storeu_ps(to + kLanes, high, __m512(value.high));
    // The next panel's: lines so far apart are not what the processor foresees.
    __builtin_prefetch(to + kPanel, 1);
    __builtin_prefetch(to + kPanel + kLanes, 1);
  }
};

inline void store_found(int32_t* to, I32 found) {
  I32 before;
  __builtin_memcpy(&before, to, sizeof before);
  found = larger(before, found);
  __builtin_memcpy(to, &found, sizeof found);
}

// y: sum * (row_scale * column_scale) + shift, and the ReLU.
struct Outputs {
  const float* row_scale;
  const float* column_scale;  // [kPanel], like shift
  const float* shift;
  float floor;                // 0 for a ReLU, otherwise -infinity
  uint32_t* positive;         // rows `positive_row` apart; null if nobody will ask
  int64_t positive_row;
  int32_t* found;             // [rows][kLanes], largest magnitudes so far
  RowsOut out;

  void operator()(int64_t row, I32 low, I32 high) const {
    const F32 scale = all(row_scale[row]);
    F32 value[2];
    uint32_t bits = 0;
#pragma GCC unroll 2
    for (int v = 0; v < 2; ++v) {
      const F32 sum = to_float(v == 0 ? low : high);
      value[v] = sum * (scale * load(column_scale + v * kLanes)) + load(shift + v * kLanes);
      // A NaN counts as positive and stays a NaN.
      bits |= uint32_t(_mm512_cmp_ps_mask(__m512(value[v]), __m512{}, _CMP_NLE_UQ))
              << (v * kLanes);
      value[v] = F32(_mm512_max_ps(_mm512_set1_ps(floor), __m512(value[v])));
    }
    if (positive) positive[row * positive_row] = bits;
    const Columns made{value[0], value[1]};
    store_found(found + row * kLanes, larger(I32{}, made));
    out.store(row, made);
  }
  void close() const {}
};

// Columns of the gradient g of a layer's output, before the ReLU: kept in `out`, and what their
// grids need.
struct Gradients {
  const uint32_t* positive;  // rows `positive_row` apart
  int64_t positive_row;
  const float* weight_scale;  // [kPanel]
  const float* input_scale;   // [rows]
  int32_t* found;             // [rows][kLanes], largest magnitudes of g * weight_scale so far
  float* out;                 // rows `out_row` apart
  int64_t out_row;
  float* bias_part;           // [kPanel], like the next two
  float* scale;               // of g * input_scale, and its reciprocal
  float* reciprocal;
  Columns sum{};
  I32 low{};
  I32 high{};

  void take(int64_t row, Columns value) {
    const uint32_t bits = positive[row * positive_row];
    value = {F32(_mm512_maskz_mov_ps(__mmask16(bits), __m512(value.low))),
             F32(_mm512_maskz_mov_ps(__mmask16(bits >> 16), __m512(value.high)))};
    store(out + row * out_row, value.low);
    store(out + row * out_row + kLanes, value.high);
    sum = {sum.low + value.low, sum.high + value.high};
    const Columns weighted = scaled(value, load_columns(weight_scale, kPanel));
    store_found(found + row * kLanes, larger(I32{}, weighted));
    const Columns grown = scaled(value, all(input_scale[row]));
    low = larger(low, magnitude(grown.low));
    high = larger(high, magnitude(grown.high));
  }
  void close() const {
    store_columns(bias_part, sum, kPanel);
    const Scales scales[] = {gradient_scales(low), gradient_scales(high)};
    store_columns(scale, {scales[0].value, scales[1].value}, kPanel);
    store_columns(reciprocal, {scales[0].reciprocal, scales[1].reciprocal}, kPanel);
  }
};

// dx, which is the gradient of the output below.
struct GradientsBelow {
  const float* row_scale;
  Gradients gradients;

  void operator()(int64_t row, I32 low, I32 high) {
    gradients.take(row, scaled({to_float(low), to_float(high)}, all(row_scale[row])));
  }
  void close() const { gradients.close(); }
};

// dx of the first layer.
struct GradientsOutside {
  const float* row_scale;
  RowsOut out;

  void operator()(int64_t row, I32 low, I32 high) const {
    out.store(row, scaled({to_float(low), to_float(high)}, all(row_scale[row])));
  }
  void close() const {}
};

// dw: sum * row_scale, plus what is there already unless it is the first.
template <bool kFirst>
struct Sums {
  const float* row_scale;
  float* out;  // [rows][kPanel]

  void operator()(int64_t row, I32 low, I32 high) const {
    const F32 scale = all(row_scale[row]);
    float* to = out + row * kPanel;
    const F32 parts[2] = {to_float(low) * scale, to_float(high) * scale};
    store(to, kFirst ? parts[0] : parts[0] + load(to));
    store(to + kLanes, kFirst ? parts[1] : parts[1] + load(to + kLanes));
  }
  void close() const {}
};

}  // namespace
}  // namespace DQRM_LEVEL
}  // namespace dqrm
