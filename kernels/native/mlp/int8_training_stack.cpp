#include "int8_training_stack.h"

#include <algorithm>
#include <memory>
#include <utility>

#include "../common/parallel.h"
#include "pieces.h"

namespace dqrm {
namespace {

constexpr int64_t kMostBlockRows = 128;
constexpr int64_t kFewestBlockRows = 64;

int64_t panels(int64_t columns) { return ceil_div(columns, kInt8TrainingPanel); }
int64_t quads(int64_t values) { return ceil_div(values, 4); }

// Kept by the thread: fresh memory for every block would come from far away.
char* thread_bytes(int64_t count) {
  thread_local std::unique_ptr<char[]> bytes;
  thread_local int64_t size = 0;
  if (size < count) {
    bytes.reset(new char[size_t(count)]);
    size = count;
  }
  return bytes.get();
}

// Panels a power of two apart would share a few cache sets.
int64_t panel_quads(int64_t batch) { return quads(batch) + 7; }

// As many parts as layers have panels of outputs, and which is which.
std::vector<int64_t> output_panels(const std::vector<Int8TrainingLayer>& layers) {
  std::vector<int64_t> counts;
  for (const Int8TrainingLayer& layer : layers) counts.push_back(panels(layer.outputs));
  return counts;
}

int64_t sum(const std::vector<int64_t>& counts) {
  int64_t all = 0;
  for (const int64_t count : counts) all += count;
  return all;
}

}  // namespace

int64_t int8_training_block_rows(int64_t batch) {
  return std::clamp(quads(ceil_div(batch, 16)) * 4, kFewestBlockRows, kMostBlockRows);
}

Int8TrainingStack::Int8TrainingStack(std::vector<MlpLayerArrays> layers, const Int8TrainingLoops& loops,
                     int64_t first_layer)
    : arrays_(std::move(layers)), loops_(&loops), first_layer_(first_layer) {
  for (const MlpLayerArrays& layer : arrays_) {
    width_ = std::max({width_, panels(layer.inputs), panels(layer.outputs)});
  }
  width_ *= kInt8TrainingPanel;
}

int64_t Int8TrainingStack::place(char* base, int64_t batch, bool training,
                         std::vector<Int8TrainingLayer>* layers) const {
  Pieces pieces(base);
  const int64_t blocks = ceil_div(batch, int8_training_block_rows(batch));
  layers->resize(arrays_.size());
  for (size_t i = 0; i < arrays_.size(); ++i) {
    const MlpLayerArrays& from = arrays_[i];
    Int8TrainingLayer& to = (*layers)[i];
    to = {};
    to.inputs = from.inputs;
    to.outputs = from.outputs;
    to.largest_code = float((1 << (from.bits - 1)) - 1);
    to.relu = from.relu;
    to.weight = from.weight;
    to.bias = from.bias;
    to.weight_gradient = from.weight_gradient;
    to.bias_gradient = from.bias_gradient;
    const int64_t inputs = panels(from.inputs) * kInt8TrainingPanel;
    const int64_t outputs = panels(from.outputs) * kInt8TrainingPanel;
    to.forward_panels = pieces.take<int8_t>(outputs * quads(from.inputs) * 4);
    to.forward_start = pieces.take<int32_t>(outputs);
    to.scale = pieces.take<float>(outputs);
    to.shift = pieces.take<float>(outputs);
    if (!training) continue;
    to.backward_panels = pieces.take<int8_t>(inputs * quads(from.outputs) * 4);
    to.backward_start = pieces.take<int32_t>(inputs);
    to.input_scale = pieces.take<float>(batch);
    to.input_quads = pieces.take<int8_t>(inputs * panel_quads(batch) * 4);
    to.input_start = pieces.take<int32_t>(blocks * inputs);
    to.positive = pieces.take<uint32_t>(batch * panels(from.outputs));
    to.gradient_quads = pieces.take<uint8_t>(outputs * panel_quads(batch) * 4);
    to.gradient_scale = pieces.take<float>(blocks * outputs);
    to.bias_parts = pieces.take<float>(blocks * outputs);
  }
  return pieces.used();
}

int64_t Int8TrainingStack::workspace_bytes(int64_t batch, bool training) const {
  std::vector<Int8TrainingLayer> layers;
  return place(nullptr, batch, training, &layers) + kLineBytes;
}

Int8TrainingScratch Int8TrainingStack::scratch(int64_t block_rows) const {
  // An odd number of cache lines: rows a power of two apart would share a few cache sets.
  const int64_t line = kLineBytes / int64_t(sizeof(float));
  Int8TrainingScratch made{};
  made.value_stride = (width_ / line | 1) * line;
  made.width = width_;
  const auto place = [&](char* base) {
    Pieces pieces(base);
    made.values = pieces.take<float>(block_rows * made.value_stride);
    made.bytes = pieces.take<uint8_t>(block_rows * width_);
    made.row_scales = pieces.take<float>(block_rows);
    made.found = pieces.take<int32_t>(block_rows * kInt8TrainingPanel / 2);
    made.column_factors = pieces.take<float>(width_);
    return pieces.used();
  };
  place(aligned(thread_bytes(place(nullptr) + kLineBytes)));
  return made;
}

void Int8TrainingStack::forward(MlpOutside x, int64_t batch, MlpOutside y, void* workspace,
                        bool training, int threads) const {
  std::vector<Int8TrainingLayer> layers;
  place(aligned(workspace), batch, training, &layers);
  const std::vector<int64_t> counts = output_panels(layers);
  auto pack = [&](int64_t position) {
    const LayerPart at = find_part(position, counts);
    loops_->pack(layers[at.layer], at.part, training);
  };
  parallel_for(threads, sum(counts), pack);
  if (training) {
    for (const Int8TrainingLayer& layer : layers) loops_->start_backward(layer);
  }

  const Int8TrainingBatch cut{batch, int8_training_block_rows(batch), panel_quads(batch)};
  auto run = [&](int64_t block) {
    loops_->forward(layers.data(), int64_t(layers.size()), x, y, cut, block, training,
                    scratch(cut.block_rows));
  };
  parallel_for(threads, ceil_div(batch, cut.block_rows), run);
}

void Int8TrainingStack::backward(MlpOutside grad_y, int64_t batch, MlpOutside grad_x, void* workspace,
                         uint64_t key, int threads) const {
  std::vector<Int8TrainingLayer> layers;
  place(aligned(workspace), batch, true, &layers);
  const Int8TrainingBatch cut{batch, int8_training_block_rows(batch), panel_quads(batch)};
  auto down = [&](int64_t block) {
    loops_->backward(layers.data(), int64_t(layers.size()), grad_y, grad_x, cut, block, key,
                     first_layer_, scratch(cut.block_rows));
  };
  parallel_for(threads, ceil_div(batch, cut.block_rows), down);

  const std::vector<int64_t> counts = output_panels(layers);
  auto add = [&](int64_t position) {
    const LayerPart at = find_part(position, counts);
    loops_->weight_gradient(layers[at.layer], at.part, cut);
  };
  parallel_for(threads, sum(counts), add);
}

}  // namespace dqrm
