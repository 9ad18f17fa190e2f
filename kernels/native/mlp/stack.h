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

  // The pieces of forward and backward, for a caller that goes through the rows itself, in parts of
  // `part_rows`. No layer may have integer inputs.
  int64_t workspace_bytes_by_parts(int64_t batch, bool training, int64_t part_rows) const;
  std::vector<MlpLayer> layers_by_parts(void* workspace, int64_t batch, bool training,
                                        int64_t part_rows) const;
  void pack(const std::vector<MlpLayer>& layers, bool training, int threads) const;
  // x and y are where row 0 of the batch would be.
  void forward_part(const std::vector<MlpLayer>& layers, int64_t begin, int64_t end, MlpOutside x,
                    MlpOutside y) const;
  // Likewise; no gradient of x is computed if grad_x.values is null.
  void backward_part(MlpPart part, const std::vector<MlpLayer>& layers, MlpOutside grad_y,
                     MlpOutside grad_x) const;
  // For a batch of no rows.
  void clear_gradients() const;
  // When all parts are done.
  void add_gradients_by_parts(const std::vector<MlpLayer>& layers, int64_t batch,
                              int64_t part_rows, int threads) const;

  // y = layers(x). Packs the weights as they are now.
  void forward(MlpOutside x, int64_t batch, MlpOutside y, void* workspace, bool training,
               int threads) const;

  // Writes the gradients of weights and biases, and of x if grad_x.values is not null, for a
  // workspace that forward(training = true) filled for the same batch.
  void backward(MlpOutside grad_y, int64_t batch, MlpOutside grad_x, void* workspace,
                int threads) const;

 private:
  // Rows of a part, and rows whose gradients are held at a time.
  struct Cut {
    int64_t part;
    int64_t held;
  };

  Cut cut(int64_t batch) const { return {rows_of_part(batch), rows_of_block(batch)}; }
  int64_t place(char* base, int64_t batch, bool training, Cut cut,
                std::vector<MlpLayer>* layers) const;
  int64_t rows_of_part(int64_t batch) const;
  int64_t rows_of_block(int64_t batch) const;
  void add_weight_gradients(const std::vector<MlpLayer>& layers, int64_t begin, int64_t end,
                            int threads) const;

  std::vector<MlpLayerArrays> arrays_;
  const MlpLoops* loops_;
};

}  // namespace dqrm
