#include "stack.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "../common/parallel.h"

namespace dqrm {
namespace {

constexpr int64_t kLineBytes = 64;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Takes consecutive pieces of a workspace, or only counts their bytes.
class Pieces {
 public:
  explicit Pieces(char* base) : base_(base) {}

  template <typename T>
  T* take(int64_t count) {
    T* piece = reinterpret_cast<T*>(base_ + used_);
    used_ += ceil_div(count * int64_t(sizeof(T)), kLineBytes) * kLineBytes;
    return piece;
  }
  int64_t used() const { return used_; }

 private:
  char* base_;
  int64_t used_ = 0;
};

// Number `position` among parts that come in one run per layer.
struct LayerPart {
  size_t layer;
  int64_t part;
};

LayerPart find(int64_t position, const std::vector<int64_t>& counts) {
  size_t layer = 0;
  while (position >= counts[layer]) position -= counts[layer++];
  return {layer, position};
}

}  // namespace

MlpStack::MlpStack(std::vector<MlpLayerArrays> layers, const MlpLoops& loops)
    : arrays_(std::move(layers)), loops_(&loops) {}

int64_t MlpStack::rows_of_part(int64_t batch) const {
  // A function of the batch alone: sums over parts are then the same for any number of threads.
  const int64_t tiles = std::clamp<int64_t>(ceil_div(batch, 16 * loops_->rows), 2, 8);
  return tiles * loops_->rows;
}

int64_t MlpStack::place(char* base, int64_t batch, bool training,
                        std::vector<MlpLayer>* layers) const {
  const int64_t unit = loops_->unit, panel = loops_->panel_columns;
  const int64_t pairs = ceil_div(batch, unit);
  Pieces pieces(base);
  const auto panels = [&](int64_t columns) { return ceil_div(columns, panel); };
  const auto matrix = [&](int64_t columns, bool with_pairs) {
    MlpMatrix made{};
    // An odd number of cache lines: rows a power of two apart would share a few cache sets.
    const int64_t line = kLineBytes / int64_t(sizeof(uint32_t));
    made.row_stride = (ceil_div(panels(columns) * panel / unit, line) | 1) * line;
    made.rows = pieces.take<uint32_t>(batch * made.row_stride);
    if (unit == 1) {
      made.pairs = made.rows;
      made.panel_stride = panel;
      made.pair_stride = made.row_stride;
    } else if (with_pairs) {
      made.panel_stride = pairs * panel;
      made.pair_stride = panel;
      made.pairs = pieces.take<uint32_t>(panels(columns) * made.panel_stride);
    }
    return made;
  };
  layers->resize(arrays_.size());
  for (size_t i = 0; i < arrays_.size(); ++i) {
    const MlpLayerArrays& from = arrays_[i];
    MlpLayer& to = (*layers)[i];
    to.inputs = from.inputs;
    to.outputs = from.outputs;
    to.largest_code = from.bits == 32 ? 0.0f : float((1 << (from.bits - 1)) - 1);
    to.relu = from.relu;
    to.weight = from.weight;
    to.bias = from.bias;
    to.weight_gradient = from.weight_gradient;
    to.bias_gradient = from.bias_gradient;
    const int64_t outputs_padded = panels(from.outputs) * panel;
    to.forward_panels = pieces.take<uint32_t>(ceil_div(from.inputs, unit) * outputs_padded);
    to.scale = pieces.take<float>(outputs_padded);
    to.shift = pieces.take<float>(outputs_padded);
    to.input = matrix(from.inputs, training);
    to.output = {};
    to.gradient = {};
    if (!training) continue;
    to.backward_panels =
        pieces.take<uint32_t>(ceil_div(from.outputs, unit) * panels(from.inputs) * panel);
    to.gradient = matrix(from.outputs, true);
    to.bias_parts = pieces.take<float>(ceil_div(batch, rows_of_part(batch)) * outputs_padded);
  }
  for (size_t i = 0; i + 1 < arrays_.size(); ++i) (*layers)[i].output = (*layers)[i + 1].input;
  if (training && arrays_.back().relu) {
    layers->back().output = matrix(arrays_.back().outputs, false);
    layers->back().output.pairs = nullptr;
  }
  return pieces.used();
}

int64_t MlpStack::workspace_bytes(int64_t batch, bool training) const {
  std::vector<MlpLayer> layers;
  return place(nullptr, batch, training, &layers) + kLineBytes;
}

namespace {

char* aligned(void* workspace) {
  const uintptr_t address = reinterpret_cast<uintptr_t>(workspace);
  return reinterpret_cast<char*>((address + kLineBytes - 1) / kLineBytes * kLineBytes);
}

}  // namespace

void MlpStack::forward(MlpOutside x, int64_t batch, MlpOutside y, void* workspace, bool training,
                       int threads) const {
  std::vector<MlpLayer> layers;
  place(aligned(workspace), batch, training, &layers);
  std::vector<int64_t> blocks;
  int64_t all_blocks = 0;
  for (const MlpLayer& layer : layers) {
    blocks.push_back(ceil_div(layer.outputs, loops_->pack_rows));
    all_blocks += blocks.back();
  }
  auto pack = [&](int64_t position) {
    const LayerPart at = find(position, blocks);
    loops_->pack(layers[at.layer], at.part, training);
  };
  parallel_for(threads, all_blocks, pack);

  const int64_t step = rows_of_part(batch);
  auto run = [&](int64_t part) {
    const int64_t begin = part * step, end = std::min(begin + step, batch);
    loops_->take_input(layers.front(), x, begin, end);
    for (const MlpLayer& layer : layers) {
      loops_->forward(layer, begin, end, &layer == &layers.back() ? y : MlpOutside{});
    }
  };
  parallel_for(threads, ceil_div(batch, step), run);
}

void MlpStack::backward(MlpOutside grad_y, int64_t batch, MlpOutside grad_x, void* workspace,
                        int threads) const {
  std::vector<MlpLayer> layers;
  place(aligned(workspace), batch, true, &layers);
  const int64_t step = rows_of_part(batch);
  const int64_t parts = ceil_div(batch, step);
  // Nobody multiplies with the scaled gradient of the first layer.
  if (loops_->unit == 2 && !grad_x.values) layers.front().gradient.rows = nullptr;

  auto down = [&](int64_t part) {
    const int64_t begin = part * step, end = std::min(begin + step, batch);
    for (const MlpLayer& layer : layers) {
      const int64_t width = ceil_div(layer.outputs, loops_->panel_columns) * loops_->panel_columns;
      std::memset(layer.bias_parts + part * width, 0, size_t(width) * sizeof(float));
    }
    loops_->take_gradient(layers.back(), grad_y, begin, end, part);
    for (size_t i = layers.size(); i-- > 1;) {
      loops_->backward(layers[i], &layers[i - 1], begin, end, part, {});
    }
    if (grad_x.values) loops_->backward(layers.front(), nullptr, begin, end, part, grad_x);
  };
  parallel_for(threads, parts, down);

  std::vector<int64_t> panels;
  int64_t all_panels = 0;
  for (const MlpLayer& layer : layers) {
    panels.push_back(ceil_div(layer.outputs, loops_->panel_columns));
    all_panels += panels.back();
  }
  auto sum = [&](int64_t position) {
    const LayerPart at = find(position, panels);
    loops_->weight_gradient(layers[at.layer], at.part, batch, parts);
  };
  parallel_for(threads, all_panels, sum);
}

}  // namespace dqrm
