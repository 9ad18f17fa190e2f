// Python's view of the embedding tables. What people got wrong is said in words; shapes that only
// dqrm/kernels/embedding.py passes are checked, as a loop must never leave its arrays.
#include "bindings.h"

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <cmath>
#include <cstdlib>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "../common/arrays.h"
#include "../common/levels.h"
#include "step_key.h"
#include "table_batch.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace dqrm {
namespace {

// Indices, which are of either integer type.
using IdArray = nb::ndarray<nb::ro, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Offsets = std::optional<Array<const int64_t>>;
using Weights = std::optional<Array<const float>>;
// Rows or an optimizer's state of rows, in whatever they are kept.
using Kept = nb::ndarray<nb::ndim<2>, nb::c_contig, nb::device::cpu>;
// [B, T, D] with contiguous [T, D].
using Samples = nb::ndarray<float, nb::ndim<3>, nb::device::cpu>;

void require(bool condition, const char* message) {
  if (!condition) throw std::invalid_argument(message);
}

Kind kind_named(const std::string& name) {
  if (name == "fp32") return Kind::fp32;
  if (name == "bf16") return Kind::bf16;
  if (name == "int8") return Kind::int8;
  require(name == "int4", "no such storage");
  return Kind::int4;
}

nb::dlpack::dtype bfloat16() { return {uint8_t(nb::dlpack::dtype_code::Bfloat), 16, 1}; }

// Whether an array is what rows, or an optimizer's state of them, are kept in.
bool holds_rows(const Kept& rows, Kind kind, size_t dim) {
  if (kind == Kind::fp32) return rows.dtype() == nb::dtype<float>() && rows.shape(1) == dim;
  if (kind == Kind::bf16) return rows.dtype() == bfloat16() && rows.shape(1) == dim;
  const size_t bytes = 2 + (kind == Kind::int8 ? dim : (dim + 1) / 2);
  return rows.dtype() == nb::dtype<uint8_t>() && rows.shape(1) == bytes;
}

bool holds_state(const Kept& state, Kind kind, size_t rows, size_t width) {
  const bool typed = state.dtype() == (kind == Kind::fp32 ? nb::dtype<float>() : bfloat16());
  return typed && state.shape(0) == rows && state.shape(1) == width;
}

const LookupLoops& lookup_loops(Kind kind, Level level) {
  switch (kind) {
    case Kind::bf16:
      return DQRM_LOOPS_AT(level, bf16_lookup_loops);
    case Kind::int8:
      return DQRM_LOOPS_AT(level, int8_lookup_loops);
    case Kind::int4:
      return DQRM_LOOPS_AT(level, int4_lookup_loops);
    default:
      return DQRM_LOOPS_AT(level, fp32_lookup_loops);
  }
}

const UpdateLoops& update_loops(Kind kind, Level level) {
  switch (kind) {
    case Kind::bf16:
      return DQRM_LOOPS_AT(level, bf16_update_loops);
    case Kind::int8:
      return DQRM_LOOPS_AT(level, int8_update_loops);
    case Kind::int4:
      return DQRM_LOOPS_AT(level, int4_update_loops);
    default:
      return DQRM_LOOPS_AT(level, fp32_update_loops);
  }
}

// The optimizer's state and settings; made once, told the rate at every step.
struct RowRule {
  RuleStep step;
  double beta1, beta2, weight_decay;
  std::optional<Kept> first, second;  // [R, 1] or [R, D]

  RowRule(const std::string& name, double eps, double beta1, double beta2, double weight_decay,
          std::optional<Kept> first, std::optional<Kept> second)
      : step{}, beta1(beta1), beta2(beta2), weight_decay(weight_decay), first(first),
        second(second) {
    if (name == "sgd") {
      step.rule = Rule::sgd;
    } else if (name == "adagrad") {
      require(first.has_value(), "adagrad needs its sums");
      step.rule = Rule::adagrad;
    } else {
      require(name == "adam" && first && second, "no such rule, or adam without its moments");
      step.rule = Rule::adam;
    }
    step.eps = float(eps);
    step.beta1 = float(beta1);
    step.beta1_rest = float(1 - beta1);
    step.beta2 = float(beta2);
    step.beta2_rest = float(1 - beta2);
    step.first = first ? first->data() : nullptr;
    step.second = second ? second->data() : nullptr;
  }

  void require_fit(const TableBatch& tables) const {
    const size_t rows = size_t(tables.rows()), dim = size_t(tables.dim());
    const char* message = "state must be [R, 1] or [R, D], of the type the storage asks for";
    if (step.rule == Rule::adagrad) {
      require(holds_state(*first, tables.kind(), rows, 1), message);
    } else if (step.rule == Rule::adam) {
      require(holds_state(*first, tables.kind(), rows, dim), message);
      require(holds_state(*second, tables.kind(), rows, dim), message);
    }
  }

  // The step at a rate; `correction1` is 1 - beta1^t, `correction2` 1 - beta2^t.
  RuleStep at(double lr, double correction1, double correction2) const {
    RuleStep now = step;
    now.lr = float(lr);
    now.decay = float(lr * weight_decay);
    now.rate = float(lr / correction1);
    now.root = float(1.0 / std::sqrt(correction2));
    return now;
  }
};

// A TableBatch and the arrays it lives on.
class Tables {
 public:
  Tables(const std::string& kind, Kept weight, int dim, std::optional<Array<int64_t>> clock,
         Array<float> scales, std::vector<std::string> names, std::vector<int64_t> rows,
         std::vector<float> largest, bool by_row, bool mean, bool clip, bool exact,
         const std::string& level)
      : weight_(weight), clock_(clock), scales_(scales), mean_(mean) {
    require(names.size() == rows.size() && names.size() == largest.size() &&
                scales.shape(0) == names.size() && !names.empty(),
            "one name, row count, largest code and scale for each table");
    const Kind kept = kind_named(kind);
    require(dim >= 1 && dim <= kMaxDim, "dim out of range");
    require(holds_rows(weight, kept, size_t(dim)), "weight does not fit the storage");
    require(kept == Kind::fp32 || (clock && clock->shape(0) == 2), "rounded rows need a clock");
    std::vector<TableSpec> specs;
    int64_t total = 0;
    for (size_t table = 0; table < names.size(); ++table) {
      require(rows[table] >= 1, "a table needs a row");
      total += rows[table];
      specs.push_back({names[table], rows[table], largest[table]});
    }
    require(size_t(total) == weight.shape(0), "weight must hold the rows of all tables");
    const Level at = level_named(level);
    const Storage storage{kept, weight.data(), dim, int64_t(weight.shape(1) * weight.itemsize()),
                          kept == Kind::fp32 ? 4 : 2, 0};
    tables_ = std::make_unique<TableBatch>(storage, scales.data(), std::move(specs), by_row, mean,
                                           clip, exact, lookup_loops(kept, at),
                                           update_loops(kept, at));
  }

  void look_up(IdArray ids, Offsets offsets, Weights weights, Samples out, int threads) {
    const Lookups lookups = lookups_of(ids, offsets, weights);
    const int64_t stride = stride_of(out, lookups);
    nb::gil_scoped_release release;
    tables_->check(lookups);
    tables_->look_up(lookups, {out.data(), stride, false}, threads);
  }

  void update(IdArray ids, Offsets offsets, Weights weights, Samples grad, const RowRule& rule,
              double lr, double correction1, double correction2, int threads) {
    const Lookups lookups = lookups_of(ids, offsets, weights);
    const int64_t stride = stride_of(grad, lookups);
    rule.require_fit(*tables_);
    nb::gil_scoped_release release;
    tables_->check(lookups);
    begin_step();
    tables_->update(lookups, grad.data(), stride, rule.at(lr, correction1, correction2), threads);
  }

  nb::tuple row_gradient(IdArray ids, Offsets offsets, Weights weights, Samples grad,
                         int threads) {
    const Lookups lookups = lookups_of(ids, offsets, weights);
    const int64_t stride = stride_of(grad, lookups);
    auto summed = std::make_unique<SummedGradient>();
    {
      nb::gil_scoped_release release;
      tables_->check(lookups);
      *summed = tables_->row_gradient(lookups, grad.data(), stride, threads);
    }
    const size_t count = summed->rows.size(), dim = size_t(tables_->dim());
    float* values = summed->values;
    nb::capsule values_owner(values, [](void* memory) noexcept { std::free(memory); });
    int64_t* rows = summed->rows.data();
    nb::capsule rows_owner(summed.release(), [](void* memory) noexcept {
      delete static_cast<SummedGradient*>(memory);
    });
    return nb::make_tuple(
        nb::ndarray<nb::pytorch, int64_t, nb::ndim<1>>(rows, {count}, rows_owner),
        nb::ndarray<nb::pytorch, float, nb::ndim<2>>(values, {count, dim}, values_owner));
  }

  void apply(Array<const int64_t> rows, Array<const float, 2> values, const RowRule& rule,
             double lr, double correction1, double correction2, int threads) {
    require(values.shape(0) == rows.shape(0) && values.shape(1) == size_t(tables_->dim()),
            "values must be [U, D] for rows [U]");
    rule.require_fit(*tables_);
    nb::gil_scoped_release release;
    tables_->check_ascending(rows.data(), int64_t(rows.shape(0)));
    begin_step();
    tables_->apply(rows.data(), int64_t(rows.shape(0)), values.data(),
                   rule.at(lr, correction1, correction2), threads);
  }

  void write_rows(Array<const int64_t> rows, Array<const float, 2> values, int threads) {
    require(values.shape(0) == rows.shape(0) && values.shape(1) == size_t(tables_->dim()),
            "values must be [U, D] for rows [U]");
    nb::gil_scoped_release release;
    set_key();
    tables_->write_rows(rows.data(), int64_t(rows.shape(0)), values.data(), threads);
  }

  void rows_changed(Array<const int64_t> rows) {
    nb::gil_scoped_release release;
    tables_->rows_changed(rows.data(), int64_t(rows.shape(0)));
  }

  int64_t maxima_bytes() const { return tables_->maxima_bytes(); }

  void rebuild(int threads) {
    nb::gil_scoped_release release;
    tables_->rebuild(threads);
  }

 private:
  // The clock holds a seed and the number of the step; see dqrm.kernels.rounding.
  void begin_step() {
    if (clock_) ++clock_->data()[1];
    set_key();
  }

  void set_key() {
    if (!clock_) return;
    tables_->set_key(step_key(uint64_t(clock_->data()[0]), uint64_t(clock_->data()[1])));
  }

  Lookups lookups_of(const IdArray& ids, const Offsets& offsets, const Weights& weights) const {
    const bool wide = ids.dtype() == nb::dtype<int64_t>();
    require(wide || ids.dtype() == nb::dtype<int32_t>(), "indices must be int32 or int64");
    const int64_t count = int64_t(ids.shape(0)), tables = tables_->tables();
    Lookups lookups{ids.data(), wide, count, nullptr, nullptr, 0};
    if (offsets) {
      const int64_t given = int64_t(offsets->shape(0));
      if (given < 1 || (given - 1) % tables != 0 || offsets->data()[0] != 0 ||
          offsets->data()[given - 1] != count) {
        throw std::invalid_argument(
            "offsets must hold num_tables * batch + 1 numbers from 0 to " + std::to_string(count) +
            ", the number of indices; got " + std::to_string(given) + " numbers for " +
            std::to_string(tables) + " tables");
      }
      lookups.offsets = offsets->data();
      lookups.batch = (given - 1) / tables;
    } else {
      if (count % tables != 0) {
        throw std::invalid_argument(std::to_string(count) + " indices do not divide into " +
                                    std::to_string(tables) +
                                    " tables; pass offsets for bags of other than one id");
      }
      lookups.batch = count / tables;
    }
    if (weights) {
      require(!mean_, "weights: only with pooling='sum', a weighted mean is undefined");
      require(int64_t(weights->shape(0)) == count, "one weight for each index");
      lookups.weights = weights->data();
    }
    return lookups;
  }

  // Floats from one sample to the next.
  int64_t stride_of(const Samples& samples, const Lookups& lookups) const {
    const int64_t dim = tables_->dim();
    if (int64_t(samples.shape(0)) != lookups.batch ||
        int64_t(samples.shape(1)) != tables_->tables() || int64_t(samples.shape(2)) != dim) {
      throw std::invalid_argument("expected shape [" + std::to_string(lookups.batch) + ", " +
                                  std::to_string(tables_->tables()) + ", " + std::to_string(dim) +
                                  "] for the batch");
    }
    if (lookups.batch == 0) return 0;
    require((dim == 1 || samples.stride(2) == 1) &&
                (samples.shape(1) == 1 || samples.stride(1) == dim),
            "a sample's vectors must be contiguous");
    return samples.stride(0);
  }

  Kept weight_;
  std::optional<Array<int64_t>> clock_;
  Array<float> scales_;
  bool mean_;
  std::unique_ptr<TableBatch> tables_;
};

}  // namespace

void bind_embedding(nb::module_& module) {
  nb::register_exception_translator([](const std::exception_ptr& pointer, void*) {
    try {
      std::rethrow_exception(pointer);
    } catch (const OutsideTable& error) {
      PyErr_SetString(PyExc_IndexError, error.message.c_str());
    }
  });
  module.attr("max_embedding_dim") = kMaxDim;
  nb::class_<RowRule>(module, "RowRule")
      .def(nb::init<const std::string&, double, double, double, double,
                    std::optional<Kept>, std::optional<Kept>>(),
           "name"_a, "eps"_a, "beta1"_a, "beta2"_a, "weight_decay"_a, "first"_a.none(),
           "second"_a.none(),
           nb::sig("def __init__(self, name: str, eps: float, beta1: float, beta2: float, "
                   "weight_decay: float, first: object, second: object) -> None"));
  nb::class_<Tables>(module, "EmbeddingTables")
      .def(nb::init<const std::string&, Kept, int, std::optional<Array<int64_t>>, Array<float>,
                    std::vector<std::string>, std::vector<int64_t>, std::vector<float>, bool, bool,
                    bool, bool, const std::string&>(),
           "kind"_a, "weight"_a, "dim"_a, "clock"_a.none(), "scales"_a, "names"_a, "rows"_a,
           "largest"_a, "by_row"_a, "mean"_a, "clip"_a, "exact"_a, "level"_a,
           nb::sig("def __init__(self, kind: str, weight: object, dim: int, clock: object, "
                   "scales: object, names: list[str], rows: list[int], largest: list[float], "
                   "by_row: bool, mean: bool, clip: bool, exact: bool, level: str) -> None"))
      .def("look_up", &Tables::look_up, "indices"_a, "offsets"_a.none(), "weights"_a.none(),
           "out"_a, "threads"_a,
           nb::sig("def look_up(self, indices: object, offsets: object, weights: object, "
                   "out: object, threads: int) -> None"))
      .def("update", &Tables::update, "indices"_a, "offsets"_a.none(), "weights"_a.none(),
           "grad"_a, "rule"_a, "lr"_a, "correction1"_a, "correction2"_a, "threads"_a,
           nb::sig("def update(self, indices: object, offsets: object, weights: object, "
                   "grad: object, rule: RowRule, lr: float, correction1: float, "
                   "correction2: float, threads: int) -> None"))
      .def("row_gradient", &Tables::row_gradient, "indices"_a, "offsets"_a.none(),
           "weights"_a.none(), "grad"_a, "threads"_a,
           nb::sig("def row_gradient(self, indices: object, offsets: object, weights: object, "
                   "grad: object, threads: int) -> tuple[object, object]"))
      .def("apply", &Tables::apply, "rows"_a, "values"_a, "rule"_a, "lr"_a, "correction1"_a,
           "correction2"_a, "threads"_a,
           nb::sig("def apply(self, rows: object, values: object, rule: RowRule, lr: float, "
                   "correction1: float, correction2: float, threads: int) -> None"))
      .def("write_rows", &Tables::write_rows, "rows"_a, "values"_a, "threads"_a,
           nb::sig("def write_rows(self, rows: object, values: object, threads: int) -> None"))
      .def("rows_changed", &Tables::rows_changed, "rows"_a,
           nb::sig("def rows_changed(self, rows: object) -> None"))
      .def("maxima_bytes", &Tables::maxima_bytes)
      .def("rebuild", &Tables::rebuild, "threads"_a);
}

}  // namespace dqrm
