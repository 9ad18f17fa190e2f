// A stack of linear layers with INT8 products: forward and backward of all of them.
#pragma once

#include <cstdint>
#include <vector>

#include "int8_training_loops.h"
#include "stack.h"

namespace dqrm {

// Like MlpStack, holds no memory of its own but a block's worth of scratch a thread.
class Int8TrainingStack {
 public:
  // All layers have 4 or 8 bits. `first_layer` is the number of the first one in the stack that
  // this one is a part of.
  Int8TrainingStack(std::vector<MlpLayerArrays> layers, const Int8TrainingLoops& loops, int64_t first_layer);

  int64_t inputs() const { return arrays_.front().inputs; }
  int64_t outputs() const { return arrays_.back().outputs; }

  // Bytes that forward, and a backward after it, need for a batch of that many rows.
  int64_t workspace_bytes(int64_t batch, bool training) const;

  // y = layers(x). Packs the weights as they are now.
  void forward(MlpOutside x, int64_t batch, MlpOutside y, void* workspace, bool training,
               int threads) const;

  // Writes the gradients of weights and biases, and of x if grad_x.values is not null, for a
  // workspace that forward(training = true) filled for the same batch. `key` decides the random
  // bits.
  void backward(MlpOutside grad_y, int64_t batch, MlpOutside grad_x, void* workspace,
                uint64_t key, int threads) const;

 private:
  int64_t place(char* base, int64_t batch, bool training, std::vector<Int8TrainingLayer>* layers) const;
  Int8TrainingScratch scratch(int64_t block_rows) const;

  std::vector<MlpLayerArrays> arrays_;
  const Int8TrainingLoops* loops_;
  int64_t first_layer_;
  int64_t width_ = 0;
};

// Rows that share a scale of dw: a function of the batch alone, so that results are the same for
// any number of threads.
int64_t int8_training_block_rows(int64_t batch);

}  // namespace dqrm
