// Linear layers on integer codes, for inference: dqrm/kernels/int8_reference.py is the definition.
//
// A unit of 32 bits holds two codes of 16 bits, or four of 8 where one instruction multiplies and
// adds those; panels are as in loops.h.
#pragma once

#include <cstdint>

#include "../common/level.h"

namespace dqrm {

struct Int8Layer {
  int64_t inputs;
  int64_t outputs;
  bool relu;
  const int8_t* codes;  // [outputs, inputs]
  const float* scale;   // [outputs]
  const float* bias;    // [outputs]

  // Packed: padded to whole panels.
  uint32_t* panels;      // [panels of outputs][input units][panel_columns]
  float* scale_columns;
  float* shift_columns;
  int32_t* sum_offset;   // what the form of the codes adds to every sum of an output
};

struct Int8Loops {
  int64_t unit;           // codes in a unit
  int64_t panel_columns;
  int64_t rows;           // rows that are computed at a time

  void (*pack)(const Int8Layer& layer);
  // Codes [rows][units_row] and scales [rows] of x [rows][x_row], `columns` wide.
  void (*quantize)(const float* x, int64_t x_row, int64_t rows, int64_t columns, uint32_t* units,
                   int64_t units_row, float* scales);
  // y [rows][y_row] of what quantize made.
  void (*forward)(const Int8Layer& layer, const uint32_t* units, int64_t units_row,
                  const float* scales, int64_t rows, float* y, int64_t y_row);
};

DQRM_DECLARE_LOOPS(Int8Loops, int8_mlp_loops)

#ifdef DQRM_X86
namespace avx512vnni {
extern const Int8Loops int8_mlp_loops;
}
#endif

}  // namespace dqrm
