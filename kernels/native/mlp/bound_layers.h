// The arrays that a stack in Python is made of; what would read or write out of bounds is refused.
#pragma once

#include <nanobind/ndarray.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "../common/arrays.h"
#include "stack.h"

namespace dqrm {

namespace nb = nanobind;

using Weights = Array<float, 2>;
using Biases = Array<float, 1>;
using Rows = nb::ndarray<float, nb::ndim<2>, nb::device::cpu>;
using Bytes = Array<uint8_t, 1>;

inline void check(bool fine, const char* message) {
  if (!fine) throw std::invalid_argument(message);
}

inline MlpOutside outside(const Rows& matrix, int64_t columns, const char* name) {
  if (int64_t(matrix.shape(1)) != columns || (columns > 1 && matrix.stride(1) != 1)) {
    throw std::invalid_argument(std::string(name) + ": wrong width or strided columns");
  }
  return {matrix.data(), matrix.stride(0)};
}

inline std::vector<MlpLayerArrays> layer_arrays(const std::vector<Weights>& weights,
                                                const std::vector<Biases>& biases,
                                                const std::vector<Weights>& weight_gradients,
                                                const std::vector<Biases>& bias_gradients,
                                                const std::vector<int>& bits,
                                                const std::vector<bool>& relu) {
  const size_t count = weights.size();
  const bool trained = !weight_gradients.empty();
  check(count > 0 && biases.size() == count && bits.size() == count && relu.size() == count &&
            bias_gradients.size() == weight_gradients.size() &&
            (!trained || weight_gradients.size() == count),
        "as many of everything as there are weights");
  std::vector<MlpLayerArrays> made;
  for (size_t i = 0; i < count; ++i) {
    const size_t outputs = weights[i].shape(0), inputs = weights[i].shape(1);
    check(outputs > 0 && inputs > 0, "weights: an empty one");
    check(i == 0 || weights[i - 1].shape(0) == inputs, "weights: they do not follow");
    check(biases[i].shape(0) == outputs, "biases: not one per output");
    check(bits[i] == 4 || bits[i] == 8 || bits[i] == 32, "bits: must be 4, 8 or 32");
    if (trained) {
      check(weight_gradients[i].shape(0) == outputs && weight_gradients[i].shape(1) == inputs &&
                bias_gradients[i].shape(0) == outputs,
            "gradients: of another shape");
    }
    made.push_back({int64_t(inputs), int64_t(outputs), bits[i], relu[i], weights[i].data(),
                    biases[i].data(), trained ? weight_gradients[i].data() : nullptr,
                    trained ? bias_gradients[i].data() : nullptr});
  }
  return made;
}

}  // namespace dqrm
