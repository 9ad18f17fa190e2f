// Python's view of gradient exchange. Arguments are checked in dqrm/kernels/*.py, which says in
// people's words what is wrong; here only what would otherwise read or write out of bounds.
#include "bindings.h"

#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>

#include <optional>
#include <stdexcept>
#include <string>

#include "../common/arrays.h"
#include "../common/levels.h"
#include "codecs.h"
#include "merge.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace dqrm {
namespace {

using Bytes = Array<uint8_t>;
using Floats = Array<float>;
using Numbers = Array<const int64_t>;
template <typename T>
using Maybe = std::optional<T>;

void require(bool holds, const char* otherwise) {
  if (!holds) throw std::invalid_argument(otherwise);
}

template <typename T>
auto data_of(const Maybe<T>& array) {
  return array ? array->data() : nullptr;
}

// `count` values in rows of `dim`, the last of which may be shorter.
CodedRows coded_rows(const Bytes& codes, const Bytes& scales, int64_t count, int64_t dim,
                     int bits, bool bfloat16) {
  require(dim > 0 && (bits == 8 || bits == 4), "dim must be positive, bits 8 or 4");
  const int64_t rows = (count + dim - 1) / dim;
  const int64_t last = rows == 0 ? 0 : count - (rows - 1) * dim;
  const int64_t bytes = rows == 0 ? 0 : (rows - 1) * ((dim * bits + 7) / 8) + (last * bits + 7) / 8;
  require(int64_t(codes.shape(0)) == bytes, "codes: wrong number of bytes");
  require(int64_t(scales.shape(0)) == rows * (bfloat16 ? 2 : 4), "scales: wrong number of bytes");
  return {rows, dim, last, bits, bfloat16 ? ScaleType::bfloat16 : ScaleType::float32,
          codes.data(), scales.data()};
}

int64_t encode(const Floats& values, const Bytes& codes, const Bytes& scales, int64_t dim,
               int bits, bool bfloat16, const Maybe<Floats>& residual, bool carried,
               Maybe<uint64_t> key, const Maybe<Numbers>& numbers, int64_t first, int threads,
               const std::string& level) {
  const int64_t count = int64_t(values.shape(0));
  const CodedRows rows = coded_rows(codes, scales, count, dim, bits, bfloat16);
  require(!residual || int64_t(residual->shape(0)) == count, "residual: as many as values");
  require(residual || !carried, "carried: needs a residual");
  require(!numbers || int64_t(numbers->shape(0)) == rows.rows, "numbers: one a row");
  const Rounding rounding{key.has_value(), key.value_or(0), data_of(numbers), first};
  const CodeLoops& loops = DQRM_LOOPS_AT(level_named(level), code_loops);
  const nb::gil_scoped_release release;
  return encode_rows(loops, rows, values.data(), data_of(residual), carried, rounding, threads);
}

void decode(const Bytes& codes, const Bytes& scales, const Floats& out,
            const Maybe<Numbers>& targets, int64_t dim, int bits, bool bfloat16, bool add,
            float alpha, int threads, const std::string& level) {
  const int64_t values = int64_t(out.shape(0));
  require(dim > 0, "dim must be positive");
  const int64_t count = targets ? int64_t(targets->shape(0)) * dim : values;
  const CodedRows rows = coded_rows(codes, scales, count, dim, bits, bfloat16);
  for (int64_t i = 0; targets && i < rows.rows; ++i) {
    const int64_t row = targets->data()[i];
    if (row < 0 || row >= values / dim) {
      throw std::out_of_range("rows: " + std::to_string(row) + " at position " +
                              std::to_string(i) + " is outside the " +
                              std::to_string(values / dim) + " rows of out");
    }
  }
  const CodeLoops& loops = DQRM_LOOPS_AT(level_named(level), code_loops);
  const nb::gil_scoped_release release;
  decode_rows(loops, rows, out.data(), data_of(targets), add, alpha, threads);
}

SignedBlocks signed_blocks(const Bytes& bits, const Bytes& scales, int64_t count, int64_t block) {
  require(block > 0 && (block % 8 == 0 || block >= count), "block: a multiple of 8");
  const SignedBlocks blocks{count, block, bits.data(), scales.data()};
  require(int64_t(bits.shape(0)) == (count + 7) / 8, "bits: wrong number of bytes");
  require(int64_t(scales.shape(0)) == 4 * blocks.blocks(), "scales: wrong number of bytes");
  return blocks;
}

int64_t pack(const Floats& gradient, const Floats& residual, const Bytes& bits,
             const Bytes& scales, int64_t block, bool squares, int threads,
             const std::string& level) {
  const int64_t count = int64_t(gradient.shape(0));
  require(int64_t(residual.shape(0)) == count, "residual: as many as gradient");
  const SignedBlocks blocks = signed_blocks(bits, scales, count, block);
  const SignLoops& loops = DQRM_LOOPS_AT(level_named(level), sign_loops);
  const nb::gil_scoped_release release;
  return encode_signs(loops, blocks, gradient.data(), residual.data(), squares, threads);
}

void unpack(const Bytes& bits, const Bytes& scales, const Floats& out, int64_t block, bool add,
            float alpha, int threads, const std::string& level) {
  const SignedBlocks blocks = signed_blocks(bits, scales, int64_t(out.shape(0)), block);
  const SignLoops& loops = DQRM_LOOPS_AT(level_named(level), sign_loops);
  const nb::gil_scoped_release release;
  decode_signs(loops, blocks, out.data(), add, alpha, threads);
}

int64_t merge(const Numbers& rows, const Array<const float, 2>& values,
              const Array<int64_t>& out_rows, const Array<float, 2>& out_values, int threads,
              const std::string& level) {
  const int64_t count = int64_t(rows.shape(0)), dim = int64_t(values.shape(1));
  require(int64_t(values.shape(0)) == count, "values: one row a row");
  require(int64_t(out_rows.shape(0)) >= count && int64_t(out_values.shape(0)) >= count &&
              int64_t(out_values.shape(1)) == dim,
          "out: room for every row");
  const MergeLoops& loops = DQRM_LOOPS_AT(level_named(level), merge_loops);
  const nb::gil_scoped_release release;
  return merge_rows(loops, {rows.data(), values.data(), count, dim}, out_rows.data(),
                    out_values.data(), threads);
}

}  // namespace

void bind_exchange(nb::module_& module) {
  module.def("encode_rows", &encode, "values"_a, "codes"_a, "scales"_a, "dim"_a, "bits"_a,
             "bfloat16"_a, "residual"_a.none(), "carried"_a, "key"_a.none(), "numbers"_a.none(),
             "first"_a, "threads"_a, "level"_a,
             nb::sig("def encode_rows(values: object, codes: object, scales: object, dim: int, "
                     "bits: int, bfloat16: bool, residual: object | None, carried: bool, "
                     "key: int | None, numbers: object | None, first: int, threads: int, "
                     "level: str) -> int"));
  module.def("decode_rows", &decode, "codes"_a, "scales"_a, "out"_a, "rows"_a.none(), "dim"_a,
             "bits"_a, "bfloat16"_a, "add"_a, "alpha"_a, "threads"_a, "level"_a,
             nb::sig("def decode_rows(codes: object, scales: object, out: object, "
                     "rows: object | None, dim: int, bits: int, bfloat16: bool, add: bool, "
                     "alpha: float, threads: int, level: str) -> None"));
  module.def("pack_signs", &pack, "gradient"_a, "residual"_a, "bits"_a, "scales"_a, "block"_a,
             "squares"_a, "threads"_a, "level"_a,
             nb::sig("def pack_signs(gradient: object, residual: object, bits: object, "
                     "scales: object, block: int, squares: bool, threads: int, level: str) "
                     "-> int"));
  module.def("unpack_signs", &unpack, "bits"_a, "scales"_a, "out"_a, "block"_a, "add"_a,
             "alpha"_a, "threads"_a, "level"_a,
             nb::sig("def unpack_signs(bits: object, scales: object, out: object, block: int, "
                     "add: bool, alpha: float, threads: int, level: str) -> None"));
  module.def("merge_rows", &merge, "rows"_a, "values"_a, "out_rows"_a, "out_values"_a,
             "threads"_a, "level"_a,
             nb::sig("def merge_rows(rows: object, values: object, out_rows: object, "
                     "out_values: object, threads: int, level: str) -> int"));
}

}  // namespace dqrm
