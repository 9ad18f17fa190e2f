// A stack of linear layers on integer codes, packed once.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <vector>

#include "int8.h"

namespace dqrm {

class Int8Stack {
 public:
  // Layers with codes, scale and bias set; their arrays are read here only.
  Int8Stack(std::vector<Int8Layer> layers, const Int8Loops& loops);

  int64_t inputs() const { return layers_.front().inputs; }
  int64_t outputs() const { return layers_.back().outputs; }

  // y [rows][y_row] = layers(x [rows][x_row]).
  void forward(const float* x, int64_t x_row, int64_t rows, float* y, int64_t y_row,
               int threads) const;

 private:
  struct Free {
    void operator()(void* memory) const { std::free(memory); }
  };

  std::vector<Int8Layer> layers_;
  const Int8Loops* loops_;
  std::unique_ptr<char, Free> memory_;
  int64_t widest_ = 0;  // columns of any layer, padded to whole panels
};

}  // namespace dqrm
