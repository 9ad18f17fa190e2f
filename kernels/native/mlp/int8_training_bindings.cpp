// Python's view of stacks of linear layers with INT8 products.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/vector.h>

#include <optional>
#include <stdexcept>
#include <utility>
#include <vector>

#include "../common/levels.h"
#include "bindings.h"
#include "bound_layers.h"
#include "int8_training_stack.h"

using namespace nanobind::literals;

namespace dqrm {
namespace {

const Int8TrainingLoops& loops_here() {
#ifdef DQRM_X86
  if (has_avx512_vnni()) return avx512vnni::int8_training_loops;
#endif
  throw std::invalid_argument("INT8 products need AVX512-VNNI");
}

// Of the layers before and behind.
const MlpLoops& other_loops() {
#ifdef DQRM_X86
  if (has_fast_avx512_bf16()) return avx512bf16::mlp_loops;
  return avx512::mlp_loops;
#else
  return scalar::mlp_loops;
#endif
}

// A stack and the arrays it works on, which it keeps alive.
class BoundInt8TrainingStack {
 public:
  BoundInt8TrainingStack(std::vector<Weights> weights, std::vector<Biases> biases,
                         std::vector<Weights> weight_gradients,
                         std::vector<Biases> bias_gradients, const std::vector<int>& bits,
                         const std::vector<bool>& relu, int64_t first_layer, int64_t before,
                         int64_t behind)
      : weights_(std::move(weights)),
        biases_(std::move(biases)),
        weight_gradients_(std::move(weight_gradients)),
        bias_gradients_(std::move(bias_gradients)),
        stack_(made(layer_arrays(weights_, biases_, weight_gradients_, bias_gradients_, bits,
                                 relu),
                    first_layer, before, behind)) {
    check(!weight_gradients_.empty(), "gradients: none");
  }

  int64_t workspace_bytes(int64_t batch, bool training) const {
    return stack_.workspace_bytes(batch, training);
  }

  void forward(const Rows& x, const Rows& y, const Bytes& workspace, bool training,
               int threads) const {
    const int64_t batch = int64_t(x.shape(0));
    const MlpOutside from = outside(x, stack_.inputs(), "x");
    const MlpOutside to = outside(y, stack_.outputs(), "y");
    check(int64_t(y.shape(0)) == batch, "y: another number of rows than x");
    check(int64_t(workspace.size()) >= workspace_bytes(batch, training), "workspace: too small");
    nb::gil_scoped_release release;
    stack_.forward(from, batch, to, workspace.data(), training, threads);
  }

  void backward(const Rows& grad_y, const std::optional<Rows>& grad_x, const Bytes& workspace,
                uint64_t key, int threads) const {
    const int64_t batch = int64_t(grad_y.shape(0));
    const MlpOutside from = outside(grad_y, stack_.outputs(), "grad_y");
    MlpOutside to{};
    if (grad_x) {
      to = outside(*grad_x, stack_.inputs(), "grad_x");
      check(int64_t(grad_x->shape(0)) == batch, "grad_x: another number of rows than grad_y");
    }
    check(int64_t(workspace.size()) >= workspace_bytes(batch, true), "workspace: too small");
    nb::gil_scoped_release release;
    stack_.backward(from, batch, to, workspace.data(), key, threads);
  }

 private:
  static Int8TrainingStack made(std::vector<MlpLayerArrays> layers, int64_t first_layer,
                                int64_t before, int64_t behind) {
    const int64_t count = int64_t(layers.size());
    check(before >= 0 && behind >= 0 && before + behind < count,
          "before, behind: more than there are layers");
    const auto others = [&](int64_t begin, int64_t end) -> std::optional<MlpStack> {
      if (begin == end) return std::nullopt;
      return MlpStack({layers.begin() + begin, layers.begin() + end}, other_loops());
    };
    const std::vector<MlpLayerArrays> own(layers.begin() + before, layers.end() - behind);
    for (const MlpLayerArrays& layer : own) {
      check(layer.bits != 32, "bits: must be 4 or 8");
      check(layer.inputs <= kInt8TrainingLongestSum && layer.outputs <= kInt8TrainingLongestSum,
            "weights: too large for sums of 32 bits");
    }
    return {others(0, before), own, others(count - behind, count), loops_here(),
            first_layer + before};
  }

  std::vector<Weights> weights_;
  std::vector<Biases> biases_;
  std::vector<Weights> weight_gradients_;
  std::vector<Biases> bias_gradients_;
  Int8TrainingStack stack_;
};

}  // namespace

void bind_int8_training(nb::module_& module) {
  nb::class_<BoundInt8TrainingStack>(module, "Int8TrainingStack")
      .def(nb::init<std::vector<Weights>, std::vector<Biases>, std::vector<Weights>,
                    std::vector<Biases>, const std::vector<int>&, const std::vector<bool>&,
                    int64_t, int64_t, int64_t>(),
           "weights"_a, "biases"_a, "weight_gradients"_a, "bias_gradients"_a, "bits"_a, "relu"_a,
           "first_layer"_a, "before"_a, "behind"_a,
           nb::sig("def __init__(self, weights: list[object], biases: list[object], "
                   "weight_gradients: list[object], bias_gradients: list[object], "
                   "bits: list[int], relu: list[bool], first_layer: int, before: int, behind: int) "
                   "-> None"),
           "The first `before` and the last `behind` layers are not INT8.")
      .def("workspace_bytes", &BoundInt8TrainingStack::workspace_bytes, "batch"_a, "training"_a)
      .def("forward", &BoundInt8TrainingStack::forward, "x"_a, "y"_a, "workspace"_a, "training"_a,
           "threads"_a,
           nb::sig("def forward(self, x: object, y: object, workspace: object, training: bool, "
                   "threads: int) -> None"))
      .def("backward", &BoundInt8TrainingStack::backward, "grad_y"_a, "grad_x"_a.none(), "workspace"_a,
           "key"_a, "threads"_a,
           nb::sig("def backward(self, grad_y: object, grad_x: object, workspace: object, "
                   "key: int, threads: int) -> None"));
}

}  // namespace dqrm
