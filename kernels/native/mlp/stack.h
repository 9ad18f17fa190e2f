// A stack of linear layers, each followed by a ReLU or not: forward and backward of all of them.
#pragma once

#include <cstdint>
#include <vector>

#include "loops.h"

namespace dqrm {

// What one layer is made of; the arrays are the caller's. Gradients are null in a stack that is
// only evaluated.
struct MlpLayerArrays {
  int64_t inputs;
  int64_t outputs;
  int bits;  // 32: not quantized
  bool relu;
  const float* weight;
  const float* bias;
  float* weight_gradient;
  float* bias_gradient;
  int activation_bits = 32;  // 8: the input is quantized row by row; 32: it is not
};

// Holds no memory of its own: activations and packed weights lie in a workspace of the caller's,
// so that one stack can be in several places of a computation at once.
class MlpStack {
 public:
  MlpStack(std::vector<MlpLayerArrays> layers, const MlpLoops& loops);

  int64_t inputs() const { return arrays_.front().inputs; }
  int64_t outputs() const { return arrays_.back().outputs; }

  // Bytes that forward, and a backward after it, need for a batch of that many rows.
  int64_t workspace_bytes(int64_t batch, bool training) const;

  // y = layers(x). Packs the weights as they are now.
  void forward(MlpOutside x, int64_t batch, MlpOutside y, void* workspace, bool training,
               int threads) const;

  // Writes the gradients of weights and biases, and of x if grad_x.values is not null, for a
  // workspace that forward(training = true) filled for the same batch.
  void backward(MlpOutside grad_y, int64_t batch, MlpOutside grad_x, void* workspace,
                int threads) const;

 private:
  int64_t place(char* base, int64_t batch, bool training, std::vector<MlpLayer>* layers) const;
  int64_t rows_of_part(int64_t batch) const;
  int64_t rows_of_block(int64_t batch) const;
  void backward_part(MlpPart part, const std::vector<MlpLayer>& layers, MlpOutside grad_y,
                     MlpOutside grad_x) const;
  void add_weight_gradients(const std::vector<MlpLayer>& layers, int64_t begin, int64_t end,
                            int threads) const;

  std::vector<MlpLayerArrays> arrays_;
  const MlpLoops* loops_;
};

}  // namespace dqrm
