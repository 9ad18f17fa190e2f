// Python's view of stacks of linear layers. dqrm/kernels/mlp.py says in people's words what is
// wrong with an argument; here only what would otherwise read or write out of bounds.
#include "bindings.h"

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "../common/arrays.h"
#include "../common/levels.h"
#include "loss_loops.h"
#include "stack.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace dqrm {
namespace {

using Weights = Array<float, 2>;
using Biases = Array<float, 1>;
using Rows = nb::ndarray<float, nb::ndim<2>, nb::device::cpu>;
using Bytes = Array<uint8_t, 1>;

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

MlpOutside outside(const Rows& matrix, int64_t columns, const char* name) {
  if (int64_t(matrix.shape(1)) != columns || (columns > 1 && matrix.stride(1) != 1)) {
    throw std::invalid_argument(std::string(name) + ": wrong width or strided columns");
  }
  return {matrix.data(), matrix.stride(0)};
}

// A stack and the arrays it works on, which it keeps alive.
class BoundStack {
 public:
  BoundStack(std::vector<Weights> weights, std::vector<Biases> biases,
             std::vector<Weights> weight_gradients, std::vector<Biases> bias_gradients,
             const std::vector<int>& bits, const std::vector<bool>& relu, bool bf16,
             const std::string& level)
      : weights_(std::move(weights)),
        biases_(std::move(biases)),
        weight_gradients_(std::move(weight_gradients)),
        bias_gradients_(std::move(bias_gradients)),
        stack_(layers(bits, relu), loops_for(bf16, level)) {}

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
  static void check(bool fine, const char* message) {
    if (!fine) throw std::invalid_argument(message);
  }

  std::vector<MlpLayerArrays> layers(const std::vector<int>& bits,
                                     const std::vector<bool>& relu) const {
    const size_t count = weights_.size();
    const bool trained = !weight_gradients_.empty();
    check(count > 0 && biases_.size() == count && bits.size() == count && relu.size() == count &&
              bias_gradients_.size() == weight_gradients_.size() &&
              (!trained || weight_gradients_.size() == count),
          "as many of everything as there are weights");
    std::vector<MlpLayerArrays> made;
    for (size_t i = 0; i < count; ++i) {
      const size_t outputs = weights_[i].shape(0), inputs = weights_[i].shape(1);
      check(outputs > 0 && inputs > 0, "weights: an empty one");
      check(i == 0 || weights_[i - 1].shape(0) == inputs, "weights: they do not follow");
      check(biases_[i].shape(0) == outputs, "biases: not one per output");
      check(bits[i] == 4 || bits[i] == 8 || bits[i] == 32, "bits: must be 4, 8 or 32");
      if (trained) {
        check(weight_gradients_[i].shape(0) == outputs && weight_gradients_[i].shape(1) == inputs &&
                  bias_gradients_[i].shape(0) == outputs,
              "gradients: of another shape");
      }
      made.push_back({int64_t(inputs), int64_t(outputs), bits[i], relu[i], weights_[i].data(),
                      biases_[i].data(), trained ? weight_gradients_[i].data() : nullptr,
                      trained ? bias_gradients_[i].data() : nullptr});
    }
    return made;
  }

  std::vector<Weights> weights_;
  std::vector<Biases> biases_;
  std::vector<Weights> weight_gradients_;
  std::vector<Biases> bias_gradients_;
  MlpStack stack_;
};

double bce_with_logits(const Array<float>& logits, const Array<float>& labels,
                       const Array<float>& gradients, const std::string& level) {
  const size_t count = logits.size();
  if (labels.size() != count || gradients.size() != count) {
    throw std::invalid_argument("as many labels and gradients as logits");
  }
  const LossLoops& loops = DQRM_LOOPS_AT(level_named(level), loss_loops);
  const float factor = count == 0 ? 0.0f : float(1.0 / double(count));
  nb::gil_scoped_release release;
  return loops.bce(logits.data(), labels.data(), gradients.data(), int64_t(count), factor);
}

}  // namespace

void bind_mlp(nb::module_& module) {
  nb::class_<BoundStack>(module, "MlpStack")
      .def(nb::init<std::vector<Weights>, std::vector<Biases>, std::vector<Weights>,
                    std::vector<Biases>, const std::vector<int>&, const std::vector<bool>&, bool,
                    const std::string&>(),
           "weights"_a, "biases"_a, "weight_gradients"_a, "bias_gradients"_a, "bits"_a, "relu"_a,
           "bf16"_a, "level"_a,
           nb::sig("def __init__(self, weights: list[object], biases: list[object], "
                   "weight_gradients: list[object], bias_gradients: list[object], "
                   "bits: list[int], relu: list[bool], bf16: bool, level: str) -> None"))
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
             "level"_a,
             nb::sig("def bce_with_logits(logits: object, labels: object, gradients: object, "
                     "level: str) -> float"),
             "Sum of the losses; gradients of their mean are written.");
}

}  // namespace dqrm
