// Python's view of the dot interaction. Shapes are checked here rather than in Python, where a
// check costs as much as the call.
#include "bindings.h"

#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "../common/levels.h"
#include "interaction.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace dqrm {
namespace {

using AnyArray = nb::ndarray<nb::device::cpu>;

std::string text_of(const AnyArray& array) {
  std::string text = "[";
  for (size_t i = 0; i < array.ndim(); ++i) {
    text += (i != 0 ? ", " : "") + std::to_string(array.shape(i));
  }
  return text + "]";
}

// A batch of samples of `floats` contiguous values each.
struct Samples {
  float* data;
  int64_t stride;
  int64_t floats;

  const float* end(int64_t batch) const {
    return batch == 0 ? data : data + (batch - 1) * stride + floats;
  }
};

Samples samples_of(const AnyArray& array, const char* name, size_t dims) {
  if (array.dtype() != nb::dtype<float>()) {
    throw std::invalid_argument(std::string(name) + ": must be float32");
  }
  if (array.ndim() != dims) {
    throw std::invalid_argument(std::string(name) + ": must have " + std::to_string(dims) +
                                " dimensions, has shape " + text_of(array));
  }
  int64_t floats = 1;
  for (size_t i = dims - 1; i > 0; --i) {
    if (array.shape(i) > 1 && array.stride(i) != floats) {
      throw std::invalid_argument(std::string(name) + ": a sample's values must be contiguous");
    }
    floats *= int64_t(array.shape(i));
  }
  // Torch gives a dimension of one entry any stride.
  const int64_t stride = array.shape(0) > 1 ? array.stride(0) : floats;
  if (array.shape(0) > 1 && stride < floats) {
    throw std::invalid_argument(std::string(name) + ": samples must not overlap");
  }
  return {static_cast<float*>(array.data()), stride, floats};
}

void require_apart(const Samples& written, const Samples& read, int64_t batch) {
  if (written.data < read.end(batch) && read.data < written.end(batch)) {
    throw std::invalid_argument("what is written must not share memory with what is read");
  }
}

struct Call {
  Interaction work;
  int64_t batch;
};

Call call_of(const AnyArray& vectors, const AnyArray& output, const char* output_name,
             bool itself, const Samples& input, const Samples& triangle) {
  const int64_t batch = int64_t(vectors.shape(0));
  const int64_t count = int64_t(vectors.shape(1)), dim = int64_t(vectors.shape(2));
  if (count == 0 || dim == 0) {
    throw std::invalid_argument("vectors: needs at least one vector of at least one value, is " +
                                text_of(vectors));
  }
  const int64_t width = dim + count * (itself ? count + 1 : count - 1) / 2;
  if (int64_t(output.shape(0)) != batch || triangle.floats != width) {
    throw std::invalid_argument(std::string(output_name) + ": must be [" + std::to_string(batch) +
                                ", " + std::to_string(width) + "], is " + text_of(output));
  }
  return {{count, dim, itself, input.data, input.stride, nullptr, 0, nullptr, 0}, batch};
}

void forward(const AnyArray& vectors, const AnyArray& out, bool itself, int threads,
             const std::string& level) {
  const Samples input = samples_of(vectors, "vectors", 3);
  const Samples output = samples_of(out, "out", 2);
  Call call = call_of(vectors, out, "out", itself, input, output);
  require_apart(output, input, call.batch);
  call.work.output = output.data;
  call.work.output_stride = output.stride;
  const InteractionLoops& loops = DQRM_LOOPS_AT(level_named(level), interaction_loops);
  const nb::gil_scoped_release release;
  interaction_forward(loops, call.work, call.batch, threads);
}

void backward(const AnyArray& vectors, const AnyArray& grad_out, const AnyArray& grad_vectors,
              bool itself, int threads, const std::string& level) {
  const Samples input = samples_of(vectors, "vectors", 3);
  const Samples grad = samples_of(grad_out, "grad_out", 2);
  const Samples output = samples_of(grad_vectors, "grad_vectors", 3);
  Call call = call_of(vectors, grad_out, "grad_out", itself, input, grad);
  for (size_t i = 0; i < 3; ++i) {
    if (grad_vectors.shape(i) != vectors.shape(i)) {
      throw std::invalid_argument("grad_vectors: must be " + text_of(vectors) + ", is " +
                                  text_of(grad_vectors));
    }
  }
  require_apart(output, input, call.batch);
  require_apart(output, grad, call.batch);
  call.work.grad = grad.data;
  call.work.grad_stride = grad.stride;
  call.work.output = output.data;
  call.work.output_stride = output.stride;
  const InteractionLoops& loops = DQRM_LOOPS_AT(level_named(level), interaction_loops);
  const nb::gil_scoped_release release;
  interaction_backward(loops, call.work, call.batch, threads);
}

}  // namespace

void bind_interaction(nb::module_& module) {
  module.def("interaction_forward", &forward, "vectors"_a, "out"_a, "itself"_a, "threads"_a,
             "level"_a,
             nb::sig("def interaction_forward(vectors: object, out: object, itself: bool, "
                     "threads: int, level: str) -> None"));
  module.def("interaction_backward", &backward, "vectors"_a, "grad_out"_a, "grad_vectors"_a,
             "itself"_a, "threads"_a, "level"_a,
             nb::sig("def interaction_backward(vectors: object, grad_out: object, "
                     "grad_vectors: object, itself: bool, threads: int, level: str) -> None"));
}

}  // namespace dqrm
