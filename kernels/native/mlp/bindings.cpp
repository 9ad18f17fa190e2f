// Python's view of stacks of linear layers. dqrm/kernels/mlp.py says in people's words what is
// wrong with an argument; here only what would otherwise read or write out of bounds.
#include "bindings.h"

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "../common/levels.h"
#include "../common/parallel.h"
#include "bound_layers.h"
#include "dropout_loops.h"
#include "loss_loops.h"
#include "stack.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace dqrm {
namespace {

const MlpLoops& loops_for(bool bf16, const std::string& level) {
  const Level at = level_named(level);
#ifdef DQRM_X86
  if (bf16) {
    if (at != Level::avx512 || !has_avx512_bf16()) {
      throw std::invalid_argument("bfloat16 needs AVX512-BF16");
    }
    return avx512bf16::mlp_loops;
  }
#else
  if (bf16) throw std::invalid_argument("bfloat16 needs AVX512-BF16");
#endif
  return DQRM_LOOPS_AT(at, mlp_loops);
}

// A stack and the arrays it works on, which it keeps alive.
class BoundStack {
 public:
  BoundStack(std::vector<Weights> weights, std::vector<Biases> biases,
             std::vector<Weights> weight_gradients, std::vector<Biases> bias_gradients,
             const std::vector<int>& bits, const std::vector<int>& activation_bits,
             const std::vector<bool>& relu, bool bf16, const std::string& level)
      : weights_(std::move(weights)),
        biases_(std::move(biases)),
        weight_gradients_(std::move(weight_gradients)),
        bias_gradients_(std::move(bias_gradients)),
        stack_(with_activations(layer_arrays(weights_, biases_, weight_gradients_, bias_gradients_,
                                             bits, relu),
                                activation_bits),
               loops_for(bf16, level)) {}

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
                int threads) const {
    const int64_t batch = int64_t(grad_y.shape(0));
    const MlpOutside from = outside(grad_y, stack_.outputs(), "grad_y");
    MlpOutside to{};
    if (grad_x) {
      to = outside(*grad_x, stack_.inputs(), "grad_x");
      check(int64_t(grad_x->shape(0)) == batch, "grad_x: another number of rows than grad_y");
    }
    check(int64_t(workspace.size()) >= workspace_bytes(batch, true), "workspace: too small");
    check(!weight_gradients_.empty(), "the stack was made without gradients");
    nb::gil_scoped_release release;
    stack_.backward(from, batch, to, workspace.data(), threads);
  }

 private:
  static std::vector<MlpLayerArrays> with_activations(std::vector<MlpLayerArrays> layers,
                                                      const std::vector<int>& activation_bits) {
    check(activation_bits.size() == layers.size(), "activation_bits: not one per layer");
    for (size_t i = 0; i < layers.size(); ++i) {
      check(activation_bits[i] == 32 || (activation_bits[i] == 8 && layers[i].bits != 32),
            "activation_bits: must be 32, or 8 with quantized weights");
      layers[i].activation_bits = activation_bits[i];
    }
    return layers;
  }

  std::vector<Weights> weights_;
  std::vector<Biases> biases_;
  std::vector<Weights> weight_gradients_;
  std::vector<Biases> bias_gradients_;
  MlpStack stack_;
};

double bce_with_logits(const Array<float>& logits, const Array<float>& labels,
                       const Array<float>& gradients, float factor, const std::string& level) {
  const size_t count = logits.size();
  if (labels.size() != count || gradients.size() != count) {
    throw std::invalid_argument("as many labels and gradients as logits");
  }
  const LossLoops& loops = DQRM_LOOPS_AT(level_named(level), loss_loops);
  nb::gil_scoped_release release;
  return loops.bce(logits.data(), labels.data(), gradients.data(), int64_t(count), factor);
}

// Values that are worth waking a thread for: about 20 microseconds of work.
constexpr int64_t kValuesPerThread = 1 << 16;

void dropout(const Array<float, 2>& values, uint32_t dropped, float factor, uint64_t key,
             int64_t first_row, const std::string& level, int threads) {
  const DropoutLoops& loops = DQRM_LOOPS_AT(level_named(level), dropout_loops);
  const int64_t rows = int64_t(values.shape(0)), columns = int64_t(values.shape(1));
  float* data = values.data();
  nb::gil_scoped_release release;
  const int64_t parts = std::clamp<int64_t>(rows * columns / kValuesPerThread, 1, threads);
  auto drop = [&](int64_t part) {
    for (int64_t row = rows * part / parts; row < rows * (part + 1) / parts; ++row) {
      loops.drop(data + row * columns, columns, key, first_row + row, dropped, factor);
    }
  };
  parallel_for(threads, parts, drop);
}

}  // namespace

void bind_mlp(nb::module_& module) {
  bind_int8_training(module);
  nb::class_<BoundStack>(module, "MlpStack")
      .def(nb::init<std::vector<Weights>, std::vector<Biases>, std::vector<Weights>,
                    std::vector<Biases>, const std::vector<int>&, const std::vector<int>&,
                    const std::vector<bool>&, bool, const std::string&>(),
           "weights"_a, "biases"_a, "weight_gradients"_a, "bias_gradients"_a, "bits"_a,
           "activation_bits"_a, "relu"_a, "bf16"_a, "level"_a,
           nb::sig("def __init__(self, weights: list[object], biases: list[object], "
                   "weight_gradients: list[object], bias_gradients: list[object], "
                   "bits: list[int], activation_bits: list[int], relu: list[bool], bf16: bool, "
                   "level: str) -> None"))
      .def("workspace_bytes", &BoundStack::workspace_bytes, "batch"_a, "training"_a)
      .def("forward", &BoundStack::forward, "x"_a, "y"_a, "workspace"_a, "training"_a,
           "threads"_a,
           nb::sig("def forward(self, x: object, y: object, workspace: object, training: bool, "
                   "threads: int) -> None"))
      .def("backward", &BoundStack::backward, "grad_y"_a, "grad_x"_a.none(), "workspace"_a,
           "threads"_a,
           nb::sig("def backward(self, grad_y: object, grad_x: object, workspace: object, "
                   "threads: int) -> None"));
  module.def("bce_with_logits", &bce_with_logits, "logits"_a, "labels"_a, "gradients"_a,
             "factor"_a, "level"_a,
             nb::sig("def bce_with_logits(logits: object, labels: object, gradients: object, "
                     "factor: float, level: str) -> float"),
             "Sum of the losses; gradients of the sum times the factor are written.");
  module.def("dropout", &dropout, "values"_a, "dropped"_a, "factor"_a, "key"_a, "first_row"_a,
             "level"_a, "threads"_a,
             nb::sig("def dropout(values: object, dropped: int, factor: float, key: int, "
                     "first_row: int, level: str, threads: int) -> None"),
             "Each value times 0 or the factor.");
}

}  // namespace dqrm
