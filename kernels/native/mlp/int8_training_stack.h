// A stack of linear layers with INT8 products, and of others before and behind them that go through
// the batch block by block with them: what one hands to the next then stays in the cache.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "int8_training_loops.h"
#include "stack.h"

namespace dqrm {

// Like MlpStack, holds no memory of its own but a block's worth of scratch a thread.
class Int8TrainingStack {
 public:
  // All layers have 4 or 8 bits. `first_layer` is the number of the first one in the stack that
  // this one is a part of.
  Int8TrainingStack(std::optional<MlpStack> before, std::vector<MlpLayerArrays> layers,
                    std::optional<MlpStack> behind, const Int8TrainingLoops& loops,
                    int64_t first_layer);

  int64_t inputs() const { return before_ ? before_->inputs() : arrays_.front().inputs; }
  int64_t outputs() const { return behind_ ? behind_->outputs() : arrays_.back().outputs; }

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
  // Everything in the workspace of one batch.
  struct Pass {
    Int8TrainingBatch cut;
    std::vector<MlpLayer> before;
    std::vector<Int8TrainingLayer> layers;
    std::vector<MlpLayer> behind;
  };
  // A block's rows between the stacks, where row 0 of the batch would be.
  struct Between {
    MlpOutside before;
    MlpOutside behind;
  };

  Pass pass(void* workspace, int64_t batch, bool training) const;
  Between between(int64_t first_row, int64_t block_rows) const;
  int64_t place(char* base, int64_t batch, bool training,
                std::vector<Int8TrainingLayer>* layers) const;
  Int8TrainingScratch scratch(int64_t block_rows) const;

  std::optional<MlpStack> before_;
  std::vector<MlpLayerArrays> arrays_;
  std::optional<MlpStack> behind_;
  const Int8TrainingLoops* loops_;
  int64_t first_layer_;
  int64_t width_ = 0;
};

// Rows that share a scale of dw: a function of the batch alone, so that results are the same for
// any number of threads.
int64_t int8_training_block_rows(int64_t batch);

}  // namespace dqrm
