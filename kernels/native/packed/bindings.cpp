// Python's view of packed tables. Arguments are checked in dqrm/kernels/packed.py, which says in
// people's words what is wrong; here only what would otherwise read or write out of bounds.
#include "bindings.h"

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
#include "tables.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace dqrm {
namespace {

using Memory = nb::ndarray<nb::ro, nb::c_contig, nb::device::cpu>;
using Scales = Array<const float>;
using Ids = nb::ndarray<nb::ro, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Out = nb::ndarray<float, nb::ndim<3>, nb::device::cpu>;

void require(bool holds, const char* otherwise) {
  if (!holds) throw std::invalid_argument(otherwise);
}

int64_t bytes_of_row(int64_t dim, int bits) { return (dim * bits + 7) / 8; }

// Holds the arrays that PackedTables reads.
class HeldTables {
 public:
  HeldTables(nb::list codes, nb::list scales, const std::vector<int>& bits,
             const std::vector<std::string>& names, int64_t dim, bool mean,
             const std::string& level)
      : tables_(hold(codes, scales, bits, names, dim), names, dim, mean, level_named(level)) {}

  void look_up(Ids ids, nb::object offsets, nb::object weights, Out out, int threads) const {
    PackedBatch batch{};
    const int64_t num_ids = int64_t(ids.shape(0));
    batch.ids = ids.data();
    batch.wide = ids.dtype() == nb::dtype<int64_t>();
    require(batch.wide || ids.dtype() == nb::dtype<int32_t>(), "indices: int32 or int64");
    batch.samples = int64_t(out.shape(0));
    batch.out = out.data();
    batch.sample_stride = out.stride(0);
    require(int64_t(out.shape(1)) == tables_.size() && int64_t(out.shape(2)) == tables_.dim(),
            "out: [B, T, D]");
    const int64_t row = tables_.size() * tables_.dim();
    const bool contiguous = (tables_.dim() == 1 || out.stride(2) == 1) &&
                            (tables_.size() == 1 || out.stride(1) == tables_.dim());
    require(out.size() == 0 || contiguous, "out: a sample's numbers must be contiguous");
    require(batch.samples <= 1 || batch.sample_stride >= row, "out: samples must not overlap");
    const int64_t bags = tables_.size() * batch.samples;
    if (offsets.is_none()) {
      require(num_ids == bags, "indices: one a bag without offsets");
    } else {
      const auto held = nb::cast<Array<const int64_t>>(offsets);
      require(int64_t(held.shape(0)) == bags + 1, "offsets: [T * B + 1]");
      batch.offsets = held.data();
    }
    if (!weights.is_none()) {
      const auto held = nb::cast<Array<const float>>(weights);
      require(int64_t(held.shape(0)) == num_ids, "weights: one an index");
      require(!tables_.mean(), "weights: only with pooling='sum', a weighted mean is undefined");
      batch.weights = held.data();
    }
    nb::gil_scoped_release release;
    tables_.look_up(batch, num_ids, threads);
  }

 private:
  std::vector<PackedTable> hold(nb::list codes, nb::list scales, const std::vector<int>& bits,
                                const std::vector<std::string>& names, int64_t dim) {
    const size_t count = bits.size();
    require(nb::len(codes) == count && nb::len(scales) == count && names.size() == count &&
                count > 0,
            "codes, scales, bits, names: one a table");
    require(dim >= 1, "dim: at least 1");
    std::vector<PackedTable> tables(count);
    for (size_t i = 0; i < count; ++i) {
      PackedTable& table = tables[i];
      require(bits[i] == 2 || bits[i] == 4 || bits[i] == 8 || bits[i] == 16 || bits[i] == 32,
              "bits: 2, 4, 8, 16 or 32");
      const auto memory = nb::cast<Memory>(codes[i]);
      require(memory.ndim() == 2, "codes: [rows, bytes]");
      table.bits = bits[i];
      table.row_bytes = bytes_of_row(dim, bits[i]);
      table.rows = int64_t(memory.shape(0));
      table.codes = static_cast<const uint8_t*>(memory.data());
      require(int64_t(memory.nbytes()) == table.rows * table.row_bytes, "codes: [rows, bytes]");
      const bool whole_lines =
          kCacheLine % table.row_bytes == 0 || table.row_bytes % kCacheLine == 0;
      const bool aligned = reinterpret_cast<uintptr_t>(table.codes) % kCacheLine == 0;
      table.last_byte = whole_lines && aligned ? 0 : table.row_bytes - 1;
      codes_.push_back(memory);
      if (table.bits == 32) continue;
      const auto held = nb::cast<Scales>(scales[i]);
      table.scale_mask = held.shape(0) == 1 ? 0 : -1;
      require(held.shape(0) == 1 || int64_t(held.shape(0)) == table.rows, "scale: [1] or [rows]");
      table.scales = held.data();
      scales_.push_back(held);
    }
    return tables;
  }

  std::vector<Memory> codes_;
  std::vector<Scales> scales_;
  PackedTables tables_;
};

}  // namespace

void bind_packed(nb::module_& module) {
  nb::class_<HeldTables>(module, "PackedTables")
      .def(nb::init<nb::list, nb::list, const std::vector<int>&, const std::vector<std::string>&,
                    int64_t, bool, const std::string&>(),
           "codes"_a, "scales"_a, "bits"_a, "names"_a, "dim"_a, "mean"_a, "level"_a,
           nb::sig("def __init__(self, codes: list[typing.Any], scales: list[typing.Any], "
                   "bits: collections.abc.Sequence[int], names: collections.abc.Sequence[str], "
                   "dim: int, mean: bool, level: str) -> None"))
      .def("look_up", &HeldTables::look_up, "ids"_a, "offsets"_a.none(), "weights"_a.none(),
           "out"_a, "threads"_a,
           nb::sig("def look_up(self, ids: object, offsets: object | None, "
                   "weights: object | None, out: object, threads: int) -> None"));
}

}  // namespace dqrm
