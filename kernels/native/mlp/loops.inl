// The loops over rows, panels and layers. The file that includes this defines, in the same
// unnamed namespace, what a unit is:
//
//   kUnit                        values in a unit
//   kRows                        rows computed at a time
//   F32 multiply_add(U32, U32, F32)
//   store_units(to, low, high)   a panel's columns of one row as units along the columns
//   load_units(from, low, high)  the same columns back
//   pair_rows(even, odd)         a unit along the rows for every column (kUnit == 2 only)
//   transposable(low, high)      kLanes units of a weight row
#include "multiply.inl"
#include "pack.inl"

namespace dqrm {
namespace DQRM_LEVEL {
namespace {

// Writes rows `row` and, if there is one, row + 1 of a panel in both layouts.
inline void write_rows(const MlpMatrix& to, int64_t row, int64_t panel, Columns even, Columns odd,
                       bool has_odd) {
  if (to.rows) {
    uint32_t* out = to.rows + row * to.row_stride + panel * (kPanel / kUnit);
    store_units(out, even.low, even.high);
    if (has_odd) store_units(out + to.row_stride, odd.low, odd.high);
  }
  if constexpr (kUnit == 2) {
    if (to.pairs) {
      uint32_t* out = to.pairs + panel * to.panel_stride + row / 2 * to.pair_stride;
      store_vector(out, pair_rows(even.low, odd.low));
      store_vector(out + kLanes, pair_rows(even.high, odd.high));
    }
  }
}

void take_input(const MlpLayer& layer, MlpOutside x, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; row += 2) {
    const bool has_odd = row + 1 < end;
    const float* from = x.values + row * x.row_stride;
    for (int64_t panel = 0; panel < panels_of(layer.inputs); ++panel) {
      const int64_t columns = layer.inputs - panel * kPanel;
      const Columns even = load_columns(from + panel * kPanel, columns);
      const Columns odd =
          has_odd ? load_columns(from + x.row_stride + panel * kPanel, columns) : Columns{};
      write_rows(layer.input, row, panel, even, odd, has_odd);
    }
  }
}

inline F32 activate(F32 sum, F32 scale, F32 shift, F32 floor) {
  return max(floor, scale * sum + shift);  // a NaN stays one
}

// tile[rows][kPanel] to rows [begin, begin + rows) of a panel of the output.
void write_output(const MlpLayer& layer, const float* tile, int64_t begin, int64_t rows,
                  int64_t panel, MlpOutside y) {
  const int64_t columns = layer.outputs - panel * kPanel;
  const Columns scale = load_columns(layer.scale + panel * kPanel, kPanel);
  const Columns shift = load_columns(layer.shift + panel * kPanel, kPanel);
  const F32 floor = all(layer.relu ? 0.0f : -__builtin_inff());
  for (int64_t i = 0; i < rows; i += 2, tile += 2 * kPanel) {
    const bool has_odd = i + 1 < rows;
    const Columns even = cut({activate(load(tile), scale.low, shift.low, floor),
                              activate(load(tile + kLanes), scale.high, shift.high, floor)},
                             columns);
    Columns odd{};
    if (has_odd) {
      odd = cut({activate(load(tile + kPanel), scale.low, shift.low, floor),
                 activate(load(tile + kPanel + kLanes), scale.high, shift.high, floor)},
                columns);
    }
    write_rows(layer.output, begin + i, panel, even, odd, has_odd);
    if (y.values) {
      float* out = y.values + (begin + i) * y.row_stride + panel * kPanel;
      store_columns(out, even, columns);
      if (has_odd) store_columns(out + y.row_stride, odd, columns);
    }
  }
}

// Passes over the panels of an operand that stay in the second-level cache, so that all rows meet
// them before the next ones are read.
constexpr int64_t kGroupUnits = 64 * 1024;

// Calls write(tile, row, rows, panel) for every tile of a [begin, end) x panels product.
template <typename Write>
void product(const MlpMatrix& left, int64_t steps, const uint32_t* panels, int64_t columns,
             int64_t begin, int64_t end, Write write) {
  alignas(64) float tile[kRows * kPanel];
  const int64_t panel_units = steps * kPanel;
  const int64_t group = kGroupUnits / panel_units > 0 ? kGroupUnits / panel_units : 1;
  const int64_t count = panels_of(columns);
  for (int64_t first = 0; first < count; first += group) {
    const int64_t last = smaller(first + group, count);
    for (int64_t row = begin; row < end; row += kRows) {
      const int64_t rows = smaller(kRows, end - row);
      const uint32_t* a = left.rows + row * left.row_stride;
      for (int64_t panel = first; panel < last; ++panel) {
        multiply_for(rows, columns - panel * kPanel)(steps, a, left.row_stride, 1,
                                                     panels + panel * panel_units, kPanel, tile);
        write(tile, row, rows, panel);
      }
    }
  }
}

void forward(const MlpLayer& layer, int64_t begin, int64_t end, MlpOutside y) {
  product(layer.input, units_of(layer.inputs), layer.forward_panels, layer.outputs, begin, end,
          [&](const float* tile, int64_t row, int64_t rows, int64_t panel) {
            write_output(layer, tile, row, rows, panel, y);
          });
}

inline F32 masked(F32 gradient, F32 output) { return output <= F32{} ? F32{} : gradient; }

// from[rows][..] to rows [begin, begin + rows) of a panel of the gradient of a layer's output.
void write_gradient(const MlpLayer& layer, MlpOutside from, int64_t begin, int64_t rows,
                    int64_t panel, int64_t part) {
  const int64_t columns = layer.outputs - panel * kPanel;
  const MlpMatrix& to = layer.gradient;
  const Columns scale = load_columns(layer.scale + panel * kPanel, kPanel);
  float* sums = layer.bias_parts + (part * panels_of(layer.outputs) + panel) * kPanel;
  Columns sum{load(sums), load(sums + kLanes)};
  const uint32_t* saved =
      layer.output.rows + begin * layer.output.row_stride + panel * (kPanel / kUnit);
  const auto read = [&](int64_t i) {
    Columns value = load_columns(from.values + i * from.row_stride, columns);
    if (layer.relu) {
      Columns output;
      load_units(saved + i * layer.output.row_stride, &output.low, &output.high);
      value = {masked(value.low, output.low), masked(value.high, output.high)};
    }
    sum = {sum.low + value.low, sum.high + value.high};
    return value;
  };
  for (int64_t i = 0; i < rows; i += 2) {
    const bool has_odd = i + 1 < rows;
    const Columns even = read(i);
    const Columns odd = has_odd ? read(i + 1) : Columns{};
    const int64_t row = begin + i;
    if constexpr (kUnit == 2) {
      // dx = (scale * dy) codes: the rows hold scale * dy, the pairs dy.
      MlpMatrix pairs = to;
      pairs.rows = nullptr;
      write_rows(pairs, row, panel, even, odd, has_odd);
      MlpMatrix scaled = to;
      scaled.pairs = nullptr;
      write_rows(scaled, row, panel, {scale.low * even.low, scale.high * even.high},
                 {scale.low * odd.low, scale.high * odd.high}, has_odd);
    } else {
      write_rows(to, row, panel, even, odd, has_odd);
    }
  }
  store(sums, sum.low);
  store(sums + kLanes, sum.high);
}

void take_gradient(const MlpLayer& layer, MlpOutside grad, int64_t begin, int64_t end,
                   int64_t part) {
  for (int64_t panel = 0; panel < panels_of(layer.outputs); ++panel) {
    write_gradient(layer, {grad.values + begin * grad.row_stride + panel * kPanel, grad.row_stride},
                   begin, end - begin, panel, part);
  }
}

void backward(const MlpLayer& layer, const MlpLayer* below, int64_t begin, int64_t end,
              int64_t part, MlpOutside grad_x) {
  product(layer.gradient, units_of(layer.outputs), layer.backward_panels, layer.inputs, begin, end,
          [&](float* tile, int64_t row, int64_t rows, int64_t panel) {
            if (below) {
              write_gradient(*below, {tile, kPanel}, row, rows, panel, part);
              return;
            }
            for (int64_t i = 0; i < rows; ++i) {
              const float* from = tile + i * kPanel;
              store_columns(grad_x.values + (row + i) * grad_x.row_stride + panel * kPanel,
                            {load(from), load(from + kLanes)}, layer.inputs - panel * kPanel);
            }
          });
}

// Row pairs summed before a weight gradient goes back to memory.
constexpr int64_t kBlockSteps = 256;

void weight_gradient(const MlpLayer& layer, int64_t panel, int64_t batch, int64_t parts) {
  alignas(64) float tile[kRows * kPanel];
  const int64_t first = panel * kPanel;
  const int64_t outputs = smaller(kPanel, layer.outputs - first);
  const int64_t steps = units_of(batch);
  const MlpMatrix& left = layer.gradient;
  const MlpMatrix& right = layer.input;
  // Nearly equal shares of the panel's rows rather than full ones and a rest.
  const int64_t shares = (outputs + kRows - 1) / kRows;
  const int64_t share = (outputs + shares - 1) / shares;
  if (batch == 0) {
    for (int64_t i = 0; i < outputs * layer.inputs; ++i) {
      layer.weight_gradient[first * layer.inputs + i] = 0.0f;
    }
  }
  for (int64_t begin = 0; begin < steps; begin += kBlockSteps) {
    const int64_t count = smaller(kBlockSteps, steps - begin);
    const uint32_t* a = left.pairs + panel * left.panel_stride + begin * left.pair_stride;
    for (int64_t q = 0; q < panels_of(layer.inputs); ++q) {
      const int64_t columns = layer.inputs - q * kPanel;
      const uint32_t* b = right.pairs + q * right.panel_stride + begin * right.pair_stride;
      for (int64_t row = 0; row < outputs; row += share) {
        const int64_t rows = smaller(share, outputs - row);
        multiply_for(rows, columns)(count, a + row, 1, left.pair_stride, b, right.pair_stride,
                                    tile);
        float* to = layer.weight_gradient + (first + row) * layer.inputs + q * kPanel;
        for (int64_t i = 0; i < rows; ++i, to += layer.inputs) {
          Columns sum{load(tile + i * kPanel), load(tile + i * kPanel + kLanes)};
          if (begin > 0) {
            const Columns before = load_columns(to, columns);
            sum = {before.low + sum.low, before.high + sum.high};
          }
          store_columns(to, sum, columns);
        }
      }
    }
  }
  const int64_t width = panels_of(layer.outputs) * kPanel;
  for (int64_t n = first; n < first + outputs; ++n) {
    float sum = 0.0f;
    for (int64_t part = 0; part < parts; ++part) sum += layer.bias_parts[part * width + n];
    layer.bias_gradient[n] = sum;
  }
}

}  // namespace

const MlpLoops mlp_loops = {
    kUnit,   kPanel,        kRows,    kLanes,          pack, take_input,
    forward, take_gradient, backward, weight_gradient,
};

}  // namespace DQRM_LEVEL
}  // namespace dqrm
