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

Int8TrainingStack::Int8TrainingStack(std::optional<MlpStack> before,
                                     std::vector<MlpLayerArrays> layers,
                                     std::optional<MlpStack> behind,
                                     const Int8TrainingLoops& loops, int64_t first_layer)
    : before_(std::move(before)),
      arrays_(std::move(layers)),
      behind_(std::move(behind)),
      loops_(&loops),
      first_layer_(first_layer) {
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
  int64_t bytes = place(nullptr, batch, training, &layers) + kLineBytes;
  const int64_t rows = int8_training_block_rows(batch);
  for (const std::optional<MlpStack>* stack : {&before_, &behind_}) {
    if (*stack) bytes += (*stack)->workspace_bytes_by_parts(batch, training, rows);
  }
  return bytes;
}

Int8TrainingStack::Pass Int8TrainingStack::pass(void* workspace, int64_t batch,
                                                bool training) const {
  const int64_t rows = int8_training_block_rows(batch);
  char* at = static_cast<char*>(workspace);
  const auto others = [&](const std::optional<MlpStack>& stack) -> std::vector<MlpLayer> {
    if (!stack) return {};
    char* const begin = at;
    at += stack->workspace_bytes_by_parts(batch, training, rows);
    return stack->layers_by_parts(begin, batch, training, rows);
  };
  Pass made{{batch, rows, panel_quads(batch)}, others(before_), {}, others(behind_)};
  place(aligned(at), batch, training, &made.layers);
  return made;
}

Int8TrainingStack::Between Int8TrainingStack::between(int64_t first_row,
                                                      int64_t block_rows) const {
  // An odd number of cache lines: rows a power of two apart would share a few cache sets.
  const int64_t line = kLineBytes / int64_t(sizeof(float));
  const auto stride = [&](int64_t columns) { return (ceil_div(columns, line) | 1) * line; };
  const int64_t first = stride(arrays_.front().inputs), last = stride(arrays_.back().outputs);
  const int64_t bytes = block_rows * (first + last) * int64_t(sizeof(float));
  float* rows = reinterpret_cast<float*>(dqrm::scratch(bytes));
  return {{rows - first_row * first, first},
          {rows + block_rows * first - first_row * last, last}};
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
  const Pass at = pass(workspace, batch, training);
  const std::vector<int64_t> counts = output_panels(at.layers);
  auto pack = [&](int64_t position) {
    const LayerPart part = find_part(position, counts);
    loops_->pack(at.layers[part.layer], part.part, training);
  };
  parallel_for(threads, sum(counts), pack);
  if (training) {
    for (const Int8TrainingLayer& layer : at.layers) loops_->start_backward(layer);
  }
  if (before_) before_->pack(at.before, training, threads);
  if (behind_) behind_->pack(at.behind, training, threads);

  auto run = [&](int64_t block) {
    const int64_t begin = block * at.cut.block_rows;
    const int64_t end = std::min(begin + at.cut.block_rows, batch);
    const Between rows = between(begin, at.cut.block_rows);
    if (before_) before_->forward_part(at.before, begin, end, x, rows.before);
    loops_->forward(at.layers.data(), int64_t(at.layers.size()), before_ ? rows.before : x,
                    behind_ ? rows.behind : y, at.cut, block, training,
                    scratch(at.cut.block_rows));
    if (behind_) behind_->forward_part(at.behind, begin, end, rows.behind, y);
  };
  parallel_for(threads, ceil_div(batch, at.cut.block_rows), run);
}

void Int8TrainingStack::backward(MlpOutside grad_y, int64_t batch, MlpOutside grad_x,
                                 void* workspace, uint64_t key, int threads) const {
  Pass at = pass(workspace, batch, true);
  // Nobody multiplies with the scaled gradient of the first layer.
  if (before_ && !grad_x.values) at.before.front().gradient.rows = nullptr;
  auto down = [&](int64_t block) {
    const int64_t begin = block * at.cut.block_rows;
    const MlpPart part{begin, std::min(begin + at.cut.block_rows, batch), 0, block};
    const Between rows = between(begin, at.cut.block_rows);
    if (behind_) behind_->backward_part(part, at.behind, grad_y, rows.behind);
    loops_->backward(at.layers.data(), int64_t(at.layers.size()), behind_ ? rows.behind : grad_y,
                     before_ ? rows.before : grad_x, at.cut, block, key, first_layer_,
                     scratch(at.cut.block_rows));
    if (before_) before_->backward_part(part, at.before, rows.before, grad_x);
  };
  parallel_for(threads, ceil_div(batch, at.cut.block_rows), down);

  const std::vector<int64_t> counts = output_panels(at.layers);
  auto add = [&](int64_t position) {
    const LayerPart part = find_part(position, counts);
    loops_->weight_gradient(at.layers[part.layer], part.part, at.cut);
  };
  parallel_for(threads, sum(counts), add);
  const auto add_others = [&](const std::optional<MlpStack>& stack,
                              const std::vector<MlpLayer>& layers) {
    if (!stack) return;
    if (batch == 0) return stack->clear_gradients();
    stack->add_gradients_by_parts(layers, batch, at.cut.block_rows, threads);
  };
  add_others(before_, at.before);
  add_others(behind_, at.behind);
}

}  // namespace dqrm
