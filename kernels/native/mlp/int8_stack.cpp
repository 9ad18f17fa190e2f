#include "int8_stack.h"

#include <algorithm>
#include <utility>

#include "../common/parallel.h"
#include "pieces.h"

namespace dqrm {
Int8Stack::Int8Stack(std::vector<Int8Layer> layers, const Int8Loops& loops)
    : layers_(std::move(layers)), loops_(&loops) {
  const auto place = [&](char* base) {
    Pieces pieces(base);
    for (Int8Layer& layer : layers_) {
      const int64_t columns = ceil_div(layer.outputs, loops.panel_columns) * loops.panel_columns;
      layer.panels = pieces.take<uint32_t>(ceil_div(layer.inputs, loops.unit) * columns);
      layer.scale_columns = pieces.take<float>(columns);
      layer.shift_columns = pieces.take<float>(columns);
      layer.sum_offset = pieces.take<int32_t>(columns);
      const int64_t widest = std::max(layer.inputs, layer.outputs);
      widest_ = std::max(widest_, ceil_div(widest, loops.panel_columns) * loops.panel_columns);
    }
    return pieces.used();
  };
  memory_.reset(allocate_lines(place(nullptr)));
  place(memory_.get());
  for (const Int8Layer& layer : layers_) loops.pack(layer);
}

void Int8Stack::forward(const float* x, int64_t x_row, int64_t rows, float* y, int64_t y_row,
                        int threads) const {
  // Values and codes of a part stay in the second-level cache.
  const int64_t step = std::clamp<int64_t>(ceil_div(rows, 16 * loops_->rows), 2, 8) * loops_->rows;
  // An odd number of cache lines: rows a power of two apart would share a few cache sets.
  const int64_t line = kLineBytes / int64_t(sizeof(uint32_t));
  const int64_t units_row = (ceil_div(widest_ / loops_->unit, line) | 1) * line;
  const int64_t parts = ceil_div(rows, step), workers = std::min<int64_t>(threads, parts);
  struct Part {
    uint32_t* units;
    float* scales;
    float* values;
  };
  const auto place = [&](char* base, Part* part) {
    Pieces pieces(base);
    *part = {pieces.take<uint32_t>(step * units_row), pieces.take<float>(step),
             pieces.take<float>(step * widest_)};
    return pieces.used();
  };
  Part part;
  const int64_t bytes = place(nullptr, &part);
  char* memory = scratch(workers * bytes);
  // A worker has memory of its own and takes every so-manieth part.
  auto work = [&](int64_t worker) {
    Part own;
    place(memory + worker * bytes, &own);
    for (int64_t begin = worker * step; begin < rows; begin += workers * step) {
      const int64_t count = std::min(step, rows - begin);
      const float* input = x + begin * x_row;
      int64_t input_row = x_row;
      for (const Int8Layer& layer : layers_) {
        loops_->quantize(input, input_row, count, layer.inputs, own.units, units_row, own.scales);
        const bool last = &layer == &layers_.back();
        loops_->forward(layer, own.units, units_row, own.scales, count,
                        last ? y + begin * y_row : own.values, last ? y_row : widest_);
        input = own.values;
        input_row = widest_;
      }
    }
  };
  parallel_for(threads, workers, work);
}

}  // namespace dqrm
