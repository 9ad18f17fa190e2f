// The loops over rows, panels and layers. The file that includes this defines, in the same
// unnamed namespace, what a unit is:
//
//   kUnit                         values in a unit
//   kRows                         rows computed at a time
//   Sum, Lane                     a vector of sums of products and its lanes: F32 and float
//   Sum multiply_add(U32, U32, Sum)
//   U32 columns_unit(low, high)   kLanes units of neighbouring columns
//   void store_units(to, low, high)     a panel's columns of one row, units along the columns
//   void pair_rows(even, odd, to)       a panel's columns of two rows, units along the rows
//   void pair_units(even, odd, to)      the same from rows that store_units wrote
//   uint32_t active(columns)            a bit for every column that is not zero
//   Columns keep(columns, active)       zero in the columns without a bit
#include "multiply.inl"
#include "pack.inl"

namespace dqrm {
namespace DQRM_LEVEL {
namespace {

void take_input(const MlpLayer& layer, MlpOutside x, int64_t begin, int64_t end) {
  const int64_t panels = panels_of(layer.inputs), inputs = layer.inputs;
  const F32 largest = all(127.0f);
  for (int64_t row = begin; row < end; ++row, x.values += x.row_stride) {
    float scale = 1.0f;
    if (layer.integer_input) {
      scale = scale_of(largest_magnitude(x.values, inputs), 127.0f);
      layer.input_scale[row] = scale;
    }
    uint32_t* to = layer.input.rows + row * layer.input.row_stride;
    for (int64_t panel = 0; panel < panels; ++panel) {
      Columns value = load_columns(x.values + panel * kPanel, inputs - panel * kPanel);
      if (layer.integer_input) {
        value = {quantized(value.low, all(scale), largest),
                 quantized(value.high, all(scale), largest)};
      }
      store_units(to + panel * (kPanel / kUnit), value.low, value.high);
    }
  }
}

inline F32 activate(F32 sum, F32 scale, F32 shift, F32 floor) {
  return max(floor, scale * sum + shift);  // a NaN stays one
}

// tile[rows][kPanel] to rows [begin, begin + rows) of a panel of the output, which in y begin at
// its first; kFull says that the panel has no unused columns.
template <bool kFull>
void write_output(const MlpLayer& layer, const float* tile, int64_t begin, int64_t rows,
                  int64_t panel, MlpOutside y) {
  const int64_t columns = kFull ? kPanel : layer.outputs - panel * kPanel;
  const Columns scale = load_columns(layer.scale + panel * kPanel, kPanel);
  const Columns shift = load_columns(layer.shift + panel * kPanel, kPanel);
  const F32 floor = all(layer.relu ? 0.0f : -__builtin_inff());
  const int64_t stride = layer.output.row_stride;
  uint32_t* to = layer.output.rows;
  if (to) to += begin * stride + panel * (kPanel / kUnit);
  uint32_t* bits = layer.active ? layer.active + panel * layer.batch + begin : nullptr;
  float* out = y.values;
  if (out) out += panel * kPanel;
  const float* input_scale = layer.input_scale ? layer.input_scale + begin : nullptr;
  for (int64_t i = 0; i < rows; ++i) {
    const Columns sum = load_columns(tile + i * kPanel, kPanel);
    Columns factor = scale;
    if (input_scale) factor = {input_scale[i] * scale.low, input_scale[i] * scale.high};
    const Columns value = cut({activate(sum.low, factor.low, shift.low, floor),
                               activate(sum.high, factor.high, shift.high, floor)},
                              columns);
    if (to) store_units(to + i * stride, value.low, value.high);
    if (bits) bits[i] = active(value);
    if (out) store_columns(out + i * y.row_stride, value, columns);
  }
}

void forward(const MlpLayer& layer, int64_t begin, int64_t end, MlpOutside y) {
  const int64_t stride = layer.input.row_stride;
  product(layer.input.rows + begin * stride, stride, end - begin, units_of(layer.inputs),
          layer.forward_panels, layer.outputs,
          [&](const float* tile, int64_t row, int64_t rows, int64_t panel) {
            const bool full = layer.outputs - panel * kPanel >= kPanel;
            const MlpOutside to{y.values ? y.values + row * y.row_stride : nullptr, y.row_stride};
            (full ? write_output<true> : write_output<false>)(layer, tile, begin + row, rows,
                                                              panel, to);
          });
}

// from[rows][..] to the rows from `begin` of a panel of the gradient of a layer's output.
template <bool kFull>
void write_gradient(const MlpLayer& layer, MlpOutside from, int64_t begin, int64_t rows,
                    int64_t panel, MlpPart part) {
  const int64_t columns = kFull ? kPanel : layer.outputs - panel * kPanel;
  const Columns scale = load_columns(layer.scale + panel * kPanel, kPanel);
  const int64_t at = panel * (kPanel / kUnit), inside = begin - part.block;
  const MlpMatrix to = layer.gradient;
  const MlpPairs pairs = layer.gradient_pairs;
  const uint32_t* bits = layer.relu ? layer.active + panel * layer.batch + begin : nullptr;
  const float* input_scale = layer.input_scale ? layer.input_scale + begin : nullptr;
  uint32_t* scaled = to.rows ? to.rows + inside * to.row_stride + at : nullptr;
  float* sums = layer.bias_parts + (part.number * panels_of(layer.outputs) + panel) * kPanel;
  Columns sum = load_columns(sums, kPanel);
  const auto read = [&](int64_t i) {
    Columns value = load_columns(from.values + i * from.row_stride, columns);
    if (bits) value = keep(value, bits[i]);
    sum = {sum.low + value.low, sum.high + value.high};
    if (scaled) {
      const Columns times =
          kUnit == 2 ? Columns{scale.low * value.low, scale.high * value.high} : value;
      store_units(scaled + i * to.row_stride, times.low, times.high);
    }
    if (input_scale) value = {input_scale[i] * value.low, input_scale[i] * value.high};
    return value;
  };
  uint32_t* out = pairs.units + panel * pairs.panel_stride + inside / kUnit * kPanel;
  for (int64_t i = 0; i < rows; i += kUnit, out += kPanel) {
    const Columns even = read(i);
    pair_rows(even, kUnit == 2 && i + 1 < rows ? read(i + 1) : Columns{}, out);
  }
  store(sums, sum.low);
  store(sums + kLanes, sum.high);
}

void write_any_gradient(const MlpLayer& layer, MlpOutside from, int64_t begin, int64_t rows,
                        int64_t panel, MlpPart part) {
  const bool full = layer.outputs - panel * kPanel >= kPanel;
  (full ? write_gradient<true> : write_gradient<false>)(layer, from, begin, rows, panel, part);
}

void take_gradient(const MlpLayer& layer, MlpOutside grad, MlpPart part) {
  float* from = grad.values + part.begin * grad.row_stride;
  for (int64_t panel = 0; panel < panels_of(layer.outputs); ++panel) {
    write_any_gradient(layer, {from + panel * kPanel, grad.row_stride}, part.begin,
                       part.end - part.begin, panel, part);
  }
}

void backward(const MlpLayer& layer, const MlpLayer* below, MlpPart part, MlpOutside grad_x) {
  const int64_t stride = layer.gradient.row_stride;
  product(layer.gradient.rows + (part.begin - part.block) * stride, stride, part.end - part.begin,
          units_of(layer.outputs), layer.backward_panels, layer.inputs,
          [&](float* tile, int64_t row, int64_t rows, int64_t panel) {
            if (below) {
              write_any_gradient(*below, {tile, kPanel}, part.begin + row, rows, panel, part);
              return;
            }
            float* to = grad_x.values + (part.begin + row) * grad_x.row_stride + panel * kPanel;
            for (int64_t i = 0; i < rows; ++i) {
              store_columns(to + i * grad_x.row_stride, load_columns(tile + i * kPanel, kPanel),
                            layer.inputs - panel * kPanel);
            }
          });
}

// Units along the rows in a block: a panel of so many fills the first-level cache.
constexpr int64_t kBlockSteps = 256;

// A panel of rows [begin, end) with units along the rows.
void gather(const MlpMatrix& from, int64_t panel, int64_t begin, int64_t end, uint32_t* block) {
  alignas(64) static const uint32_t kZeros[kPanel] = {};
  for (int64_t row = begin; row < end; row += kUnit, block += kPanel) {
    const uint32_t* even = from.rows + row * from.row_stride + panel * (kPanel / kUnit);
    pair_units(even, row + 1 < end ? even + from.row_stride : kZeros, block);
  }
}

// Rows of the next panel that are asked for while a tile is computed: reading one line a row, far
// apart, is what the processor does not foresee.
constexpr int64_t kAhead = 16;

void weight_gradient(const MlpLayer& layer, int64_t panel, int64_t first, int64_t last,
                     int64_t begin, int64_t end) {
  alignas(64) float tile[kRows * kPanel];
  alignas(64) uint32_t block[kBlockSteps * kPanel];
  const MlpPairs& left = layer.gradient_pairs;
  const int64_t columns = layer.inputs - panel * kPanel;
  gather(layer.input, panel, begin, end, block);
  int64_t next = panel + 1 < panels_of(layer.inputs) ? begin : end;
  for (int64_t above = first; above < last; ++above) {
    const uint32_t* a = left.units + above * left.panel_stride;
    const int64_t outputs = smaller(kPanel, layer.outputs - above * kPanel);
    // Nearly equal shares of the panel's rows rather than full ones and a rest.
    const int64_t shares = (outputs + kRows - 1) / kRows;
    const int64_t share = (outputs + shares - 1) / shares;
    for (int64_t row = 0; row < outputs; row += share) {
      const int64_t rows = smaller(share, outputs - row);
      for (int64_t ahead = next + kAhead; next < end && next < ahead; ++next) {
        __builtin_prefetch(layer.input.rows + next * layer.input.row_stride +
                           (panel + 1) * (kPanel / kUnit));
      }
      float* to = layer.weight_gradient + (above * kPanel + row) * layer.inputs + panel * kPanel;
      const bool add = begin > 0, direct = !add && columns >= kPanel;
      for (int64_t i = 0; add && i < rows; ++i) {
        const float* at = to + i * layer.inputs;
        __builtin_prefetch(at, 1);
        __builtin_prefetch(at + kLanes, 1);
        __builtin_prefetch(at + kPanel - 1, 1);
      }
      multiply_for(rows, columns)(units_of(end - begin), a + row, 1, kPanel, block,
                                  kPanel, direct ? to : tile, direct ? layer.inputs : kPanel);
      for (int64_t i = 0; !direct && i < rows; ++i, to += layer.inputs) {
        Columns sum = load_columns(tile + i * kPanel, columns);
        if (add) {
          const Columns before = load_columns(to, columns);
          sum = {before.low + sum.low, before.high + sum.high};
        }
        store_columns(to, sum, columns);
      }
    }
  }
}

void bias_gradient(const MlpLayer& layer, int64_t parts) {
  const int64_t width = panels_of(layer.outputs) * kPanel;
  for (int64_t n = 0; n < layer.outputs; n += kLanes) {
    F32 sum{};
    for (int64_t part = 0; part < parts; ++part) {
      sum = sum + load(layer.bias_parts + part * width + n);
    }
    store_part(layer.bias_gradient + n, sum, layer.outputs - n);
  }
}

}  // namespace

const MlpLoops mlp_loops = {
    kUnit,    kPanel,
    kRows,    kLanes,
    kBlockSteps * kUnit,
    pack,     take_input,
    forward,  take_gradient,
    backward, weight_gradient,
    bias_gradient,
};

}  // namespace DQRM_LEVEL
}  // namespace dqrm
