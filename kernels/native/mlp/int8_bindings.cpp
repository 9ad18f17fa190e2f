// Python's view of stacks of integer layers; dqrm/kernels/int8.py explains what it refuses.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "../common/arrays.h"
#include "../common/levels.h"
#include "bindings.h"
#include "int8_stack.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace dqrm {
namespace {

using Rows = nb::ndarray<float, nb::ndim<2>, nb::device::cpu>;

const Int8Loops& int8_loops_for(const std::string& level) {
  const Level at = level_named(level);
#ifdef DQRM_X86
  if (at == Level::avx512 && has_avx512_vnni()) return avx512vnni::int8_mlp_loops;
#endif
  return DQRM_LOOPS_AT(at, int8_mlp_loops);
}

void check(bool fine, const char* message) {
  if (!fine) throw std::invalid_argument(message);
}

// Sums of so many products of 8-bit codes fit 32 bits: 127 * 127 * 2^17 < 2^31.
constexpr size_t kMostInputs = size_t(1) << 17;

void make_int8_stack(Int8Stack* made, const std::vector<Array<int8_t, 2>>& codes,
                     const std::vector<Array<float>>& scales,
                     const std::vector<Array<float>>& biases, const std::vector<bool>& relu,
                     const std::string& level) {
  const size_t count = codes.size();
  check(count > 0 && scales.size() == count && biases.size() == count && relu.size() == count,
        "as many of everything as there are codes");
  std::vector<Int8Layer> layers;
  for (size_t i = 0; i < count; ++i) {
    const size_t outputs = codes[i].shape(0), inputs = codes[i].shape(1);
    check(outputs > 0 && inputs > 0 && inputs <= kMostInputs, "codes: none or too many");
    check(i == 0 || codes[i - 1].shape(0) == inputs, "codes: they do not follow");
    check(scales[i].shape(0) == outputs && biases[i].shape(0) == outputs,
          "scales and biases: not one per output");
    Int8Layer layer{};
    layer.inputs = int64_t(inputs);
    layer.outputs = int64_t(outputs);
    layer.relu = relu[i];
    layer.codes = codes[i].data();
    layer.scale = scales[i].data();
    layer.bias = biases[i].data();
    layers.push_back(layer);
  }
  new (made) Int8Stack(std::move(layers), int8_loops_for(level));
}

void forward(const Int8Stack& stack, const Rows& x, const Rows& y, int threads) {
  const auto fits = [](const Rows& rows, int64_t columns) {
    return int64_t(rows.shape(1)) == columns && (columns == 1 || rows.stride(1) == 1);
  };
  check(fits(x, stack.inputs()) && fits(y, stack.outputs()) && x.shape(0) == y.shape(0),
        "x and y: wrong shape or strided columns");
  nb::gil_scoped_release release;
  stack.forward(x.data(), x.stride(0), int64_t(x.shape(0)), y.data(), y.stride(0), threads);
}

}  // namespace

void bind_int8(nb::module_& module) {
  nb::class_<Int8Stack>(module, "Int8Stack")
      .def("__init__", &make_int8_stack, "codes"_a, "scales"_a, "biases"_a, "relu"_a, "level"_a,
           nb::sig("def __init__(self, codes: list[object], scales: list[object], "
                   "biases: list[object], relu: list[bool], level: str) -> None"))
      .def("forward", &forward, "x"_a, "y"_a, "threads"_a,
           nb::sig("def forward(self, x: object, y: object, threads: int) -> None"));
}

}  // namespace dqrm
