// INT8 loops. The file that includes this defines, in the same unnamed namespace:
//
//   kUnit, kRows                 as in loops.inl
//   Code                         a code in a unit
//   kShift                       added to an input's code, so that it is a Code
//   I32 multiply_add(U32 inputs, U32 weights, I32)
#include "multiply.inl"

namespace dqrm {
namespace DQRM_LEVEL {
namespace {

typedef Code Codes __attribute__((vector_size(sizeof(Code) * kLanes)));

void pack(const Int8Layer& layer) {
  const int64_t units = units_of(layer.inputs);
  for (int64_t n = 0; n < panels_of(layer.outputs) * kPanel; ++n) {
    const bool used = n < layer.outputs;
    layer.scale_columns[n] = used ? layer.scale[n] : 0.0f;
    layer.shift_columns[n] = used ? layer.bias[n] : 0.0f;
    uint32_t* to = layer.panels + n / kPanel * units * kPanel + n % kPanel;
    int32_t sum = 0;
    for (int64_t unit = 0; unit < units; ++unit, to += kPanel) {
      uint32_t packed = 0;
      for (int64_t i = 0; i < kUnit; ++i) {
        const int64_t k = unit * kUnit + i;
        const int32_t code = used && k < layer.inputs ? layer.codes[n * layer.inputs + k] : 0;
        sum += code;
        constexpr int kBits = 32 / kUnit;
        packed |= (uint32_t(code) & uint32_t((int64_t(1) << kBits) - 1)) << (i * kBits);
      }
      *to = packed;
    }
    layer.sum_offset[n] = kShift * sum;
  }
}

// The largest magnitude of a row, a NaN if it has one; see largest_magnitude in pack.inl.
inline float largest_of_row(const float* row, int64_t count) {
  I32 found[2] = {};
  for (int64_t k = 0; k < count; k += kPanel) {
    const Columns value = load_columns(row + k, count - k);
    const I32 low = I32(abs(value.low)), high = I32(abs(value.high));
    found[0] = low > found[0] ? low : found[0];
    found[1] = high > found[1] ? high : found[1];
  }
  found[0] = found[0] > found[1] ? found[0] : found[1];
  int32_t largest = 0;
  for (int lane = 0; lane < kLanes; ++lane) {
    largest = found[0][lane] > largest ? found[0][lane] : largest;
  }
  float value;
  __builtin_memcpy(&value, &largest, sizeof value);
  return value;
}

inline void store_codes(char* to, F32 x, F32 scale) {
  // Below 127.5 by the choice of the scale; converting a NaN gives a code nobody will see.
  const I32 codes = __builtin_convertvector(round_half_even(x / scale), I32) + kShift;
  const Codes narrow = __builtin_convertvector(codes, Codes);
  __builtin_memcpy(to, &narrow, sizeof narrow);
}

void quantize(const float* x, int64_t x_row, int64_t rows, int64_t columns, uint32_t* units,
              int64_t units_row, float* scales) {
  for (int64_t row = 0; row < rows; ++row, x += x_row, units += units_row) {
    const float largest = largest_of_row(x, columns);
    const float scale = (1e-8f > largest ? 1e-8f : largest) / 127.0f;
    // Infinity makes NaN codes and so a row of NaN; its scale must do that here.
    scales[row] = scale - scale == 0.0f ? scale : __builtin_nanf("");
    const F32 divisor = all(scale);
    char* to = reinterpret_cast<char*>(units);
    for (int64_t k = 0; k < columns; k += kPanel) {
      const Columns value = load_columns(x + k, columns - k);
      store_codes(to + k * sizeof(Code), value.low, divisor);
      store_codes(to + (k + kLanes) * sizeof(Code), value.high, divisor);
    }
  }
}

void forward(const Int8Layer& layer, const uint32_t* units, int64_t units_row, const float* scales,
             int64_t rows, float* y, int64_t y_row) {
  const F32 floor = all(layer.relu ? 0.0f : -__builtin_inff());
  product(units, units_row, rows, units_of(layer.inputs), layer.panels, layer.outputs,
          [&](const int32_t* tile, int64_t begin, int64_t count, int64_t panel) {
            const int64_t at = panel * kPanel, columns = layer.outputs - at;
            const Columns scale = load_columns(layer.scale_columns + at, kPanel);
            const Columns shift = load_columns(layer.shift_columns + at, kPanel);
            I32 offset[2];
            __builtin_memcpy(offset, layer.sum_offset + at, sizeof offset);
            for (int64_t i = 0; i < count; ++i, tile += kPanel) {
              I32 sums[2];
              __builtin_memcpy(sums, tile, sizeof sums);
              const F32 row_scale = all(scales[begin + i]);
              // Modulo 2^32, as the sums are: only the difference is sure to fit.
              const I32 first = I32(U32(sums[0]) - U32(offset[0]));
              const I32 second = I32(U32(sums[1]) - U32(offset[1]));
              const F32 low = __builtin_convertvector(first, F32);
              const F32 high = __builtin_convertvector(second, F32);
              const Columns value{max(floor, (row_scale * scale.low) * low + shift.low),
                                  max(floor, (row_scale * scale.high) * high + shift.high)};
              store_columns(y + (begin + i) * y_row + at, value, columns);
            }
          });
}

}  // namespace

const Int8Loops int8_mlp_loops = {kUnit, kPanel, kRows, pack, quantize, forward};

}  // namespace DQRM_LEVEL
}  // namespace dqrm
