#include "stack.h"

#include <algorithm>
#include <utility>

#include "../common/parallel.h"
#include "pieces.h"

namespace dqrm {
namespace {

// Parts of a layer's weight gradient, so that threads find some to share.
constexpr int64_t kLeastProducts = 8;

}  // namespace

MlpStack::MlpStack(std::vector<MlpLayerArrays> layers, const MlpLoops& loops)
    : arrays_(std::move(layers)), loops_(&loops) {}

int64_t MlpStack::rows_of_part(int64_t batch) const {
  // A function of the batch alone: sums over parts are then the same for any number of threads.
  const int64_t tiles = std::clamp<int64_t>(ceil_div(batch, 16 * loops_->rows), 2, 8);
  return tiles * loops_->rows;
}

int64_t MlpStack::rows_of_block(int64_t batch) const {
  const int64_t step = rows_of_part(batch);
  return loops_->block_rows / step * step;
}

int64_t MlpStack::place(char* base, int64_t batch, bool training, Cut cut,
                        std::vector<MlpLayer>* layers) const {
  const int64_t unit = loops_->unit, panel = loops_->panel_columns;
  const int64_t held = std::min(batch, cut.held), pairs = ceil_div(held, unit);
  Pieces pieces(base);
  const auto panels = [&](int64_t columns) { return ceil_div(columns, panel); };
  const auto matrix = [&](int64_t rows, int64_t columns) {
    // An odd number of cache lines: rows a power of two apart would share a few cache sets.
    const int64_t line = kLineBytes / int64_t(sizeof(uint32_t));
    const int64_t stride = (ceil_div(panels(columns) * panel / unit, line) | 1) * line;
    return MlpMatrix{pieces.take<uint32_t>(rows * stride), stride};
  };
  layers->resize(arrays_.size());
  for (size_t i = 0; i < arrays_.size(); ++i) {
    const MlpLayerArrays& from = arrays_[i];
    MlpLayer& to = (*layers)[i];
    to.inputs = from.inputs;
    to.outputs = from.outputs;
    to.largest_code = from.bits == 32 ? 0.0f : float((1 << (from.bits - 1)) - 1);
    to.integer_input = from.activation_bits != 32;
    to.relu = from.relu;
    to.weight = from.weight;
    to.bias = from.bias;
    to.weight_gradient = from.weight_gradient;
    to.bias_gradient = from.bias_gradient;
    const int64_t outputs_padded = panels(from.outputs) * panel;
    to.forward_panels = pieces.take<uint32_t>(ceil_div(from.inputs, unit) * outputs_padded);
    to.scale = pieces.take<float>(outputs_padded);
    to.shift = pieces.take<float>(outputs_padded);
    to.input_scale = to.integer_input ? pieces.take<float>(batch) : nullptr;
    to.input = matrix(batch, from.inputs);
    to.output = {};
    to.active = nullptr;
    if (!training) continue;
    to.backward_panels =
        pieces.take<uint32_t>(ceil_div(from.outputs, unit) * panels(from.inputs) * panel);
    to.active = from.relu ? pieces.take<uint32_t>(panels(from.outputs) * batch) : nullptr;
    to.batch = batch;
    to.gradient = matrix(held, from.outputs);
    // Panels a power of two apart would share a few cache sets.
    const int64_t stride = pairs * panel + kLineBytes / 4 * 13;
    to.gradient_pairs = {pieces.take<uint32_t>(panels(from.outputs) * stride), stride};
    to.bias_parts = pieces.take<float>(ceil_div(batch, cut.part) * outputs_padded);
  }
  for (size_t i = 0; i + 1 < arrays_.size(); ++i) {
    const MlpLayer& next = (*layers)[i + 1];
    if (!next.integer_input) (*layers)[i].output = next.input;
  }
  return pieces.used();
}

int64_t MlpStack::workspace_bytes(int64_t batch, bool training) const {
  std::vector<MlpLayer> layers;
  return place(nullptr, batch, training, cut(batch), &layers) + kLineBytes;
}

int64_t MlpStack::workspace_bytes_by_parts(int64_t batch, bool training,
                                           int64_t part_rows) const {
  std::vector<MlpLayer> layers;
  return place(nullptr, batch, training, {part_rows, batch}, &layers) + kLineBytes;
}

std::vector<MlpLayer> MlpStack::layers_by_parts(void* workspace, int64_t batch, bool training,
                                                int64_t part_rows) const {
  std::vector<MlpLayer> layers;
  place(aligned(workspace), batch, training, {part_rows, batch}, &layers);
  return layers;
}

void MlpStack::pack(const std::vector<MlpLayer>& layers, bool training, int threads) const {
  std::vector<int64_t> blocks;
  int64_t all_blocks = 0;
  for (const MlpLayer& layer : layers) {
    blocks.push_back(ceil_div(layer.outputs, loops_->pack_rows));
    all_blocks += blocks.back();
  }
  auto pack = [&](int64_t position) {
    const LayerPart at = find_part(position, blocks);
    loops_->pack(layers[at.layer], at.part, training);
  };
  parallel_for(threads, all_blocks, pack);
}

void MlpStack::forward_part(const std::vector<MlpLayer>& layers, int64_t begin, int64_t end,
                            MlpOutside x, MlpOutside y) const {
  loops_->take_input(layers[0], {x.values + begin * x.row_stride, x.row_stride}, begin, end);
  for (size_t i = 0; i + 1 < layers.size(); ++i) loops_->forward(layers[i], begin, end, {});
  loops_->forward(layers.back(), begin, end, {y.values + begin * y.row_stride, y.row_stride});
}

void MlpStack::add_gradients_by_parts(const std::vector<MlpLayer>& layers, int64_t batch,
                                      int64_t part_rows, int threads) const {
  for (int64_t begin = 0; begin < batch; begin += loops_->block_rows) {
    std::vector<MlpLayer> block = layers;
    for (MlpLayer& layer : block) {
      layer.gradient_pairs.units += begin / loops_->unit * loops_->panel_columns;
    }
    add_weight_gradients(block, begin, std::min(begin + loops_->block_rows, batch), threads);
  }
  for (const MlpLayer& layer : layers) loops_->bias_gradient(layer, ceil_div(batch, part_rows));
}

void MlpStack::forward(MlpOutside x, int64_t batch, MlpOutside y, void* workspace, bool training,
                       int threads) const {
  std::vector<MlpLayer> layers;
  place(aligned(workspace), batch, training, cut(batch), &layers);
  pack(layers, training, threads);

  // Values on their way to an integer layer, which must know a row's largest first.
  int64_t widest = 0;
  for (size_t i = 1; i < layers.size(); ++i) {
    if (layers[i].integer_input) widest = std::max(widest, layers[i].inputs);
  }
  const int64_t step = rows_of_part(batch), parts = ceil_div(batch, step);
  const int64_t workers = std::min<int64_t>(threads, parts);
  const int64_t row = ceil_div(widest, kLineBytes) * kLineBytes;
  const int64_t values_bytes = step * row * int64_t(sizeof(float));
  char* values = scratch(workers * values_bytes);
  // A worker has values of its own, and every `workers`-th part.
  auto work = [&](int64_t worker) {
    const MlpOutside between{reinterpret_cast<float*>(values + worker * values_bytes), row};
    for (int64_t begin = worker * step; begin < batch; begin += workers * step) {
      const int64_t end = std::min(begin + step, batch);
      loops_->take_input(layers[0], {x.values + begin * x.row_stride, x.row_stride}, begin, end);
      for (size_t i = 0; i < layers.size(); ++i) {
        if (i + 1 == layers.size()) {
          loops_->forward(layers[i], begin, end,
                          {y.values + begin * y.row_stride, y.row_stride});
        } else if (layers[i + 1].integer_input) {
          loops_->forward(layers[i], begin, end, between);
          loops_->take_input(layers[i + 1], between, begin, end);
        } else {
          loops_->forward(layers[i], begin, end, {});
        }
      }
    }
  };
  parallel_for(threads, workers, work);
}

void MlpStack::backward(MlpOutside grad_y, int64_t batch, MlpOutside grad_x, void* workspace,
                        int threads) const {
  std::vector<MlpLayer> layers;
  place(aligned(workspace), batch, true, cut(batch), &layers);
  if (batch == 0) return clear_gradients();
  // Nobody multiplies with the scaled gradient of the first layer.
  if (!grad_x.values) layers.front().gradient.rows = nullptr;
  const int64_t step = rows_of_part(batch);
  const int64_t block_rows = rows_of_block(batch);
  for (int64_t block = 0; block < batch; block += block_rows) {
    const int64_t block_end = std::min(block + block_rows, batch);
    auto down = [&](int64_t number) {
      const int64_t begin = block + number * step;
      backward_part({begin, std::min(begin + step, batch), block, begin / step}, layers, grad_y,
                    grad_x);
    };
    parallel_for(threads, ceil_div(block_end - block, step), down);
    add_weight_gradients(layers, block, block_end, threads);
  }
  for (const MlpLayer& layer : layers) loops_->bias_gradient(layer, ceil_div(batch, step));
}

void MlpStack::clear_gradients() const {
  for (const MlpLayerArrays& layer : arrays_) {
    std::fill_n(layer.weight_gradient, layer.outputs * layer.inputs, 0.0f);
    std::fill_n(layer.bias_gradient, layer.outputs, 0.0f);
  }
}

void MlpStack::backward_part(MlpPart part, const std::vector<MlpLayer>& layers, MlpOutside grad_y,
                             MlpOutside grad_x) const {
  for (const MlpLayer& layer : layers) {
    const int64_t width = ceil_div(layer.outputs, loops_->panel_columns) * loops_->panel_columns;
    std::fill_n(layer.bias_parts + part.number * width, width, 0.0f);
  }
  loops_->take_gradient(layers.back(), grad_y, part);
  for (size_t i = layers.size(); i-- > 1;) {
    loops_->backward(layers[i], &layers[i - 1], part, {});
  }
  if (grad_x.values) loops_->backward(layers.front(), nullptr, part, grad_x);
}

void MlpStack::add_weight_gradients(const std::vector<MlpLayer>& layers, int64_t begin,
                                    int64_t end, int threads) const {
  // A part is one panel of inputs; where those are few, with a share of the outputs.
  std::vector<int64_t> products, shares;
  int64_t all_products = 0;
  for (const MlpLayer& layer : layers) {
    const int64_t panels = ceil_div(layer.inputs, loops_->panel_columns);
    const int64_t above = ceil_div(layer.outputs, loops_->panel_columns);
    shares.push_back(std::min(above, ceil_div(kLeastProducts, panels)));
    products.push_back(panels * shares.back());
    all_products += products.back();
  }
  auto sum = [&](int64_t position) {
    const auto [number, part] = find_part(position, products);
    const MlpLayer& layer = layers[number];
    const int64_t panel = part / shares[number], share = part % shares[number];
    const int64_t above = ceil_div(layer.outputs, loops_->panel_columns);
    loops_->weight_gradient(layer, panel, above * share / shares[number],
                            above * (share + 1) / shares[number], begin, end);
  };
  parallel_for(threads, all_products, sum);
}

}  // namespace dqrm
