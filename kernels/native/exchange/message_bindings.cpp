// Python's view of row messages and of what they are made with. Arguments are checked in
// dqrm/kernels/*.py, which says in people's words what is wrong; here only what would otherwise read
// or write out of bounds.
#include "message_bindings.h"

#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>

#include <algorithm>
#include <bit>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "../common/arrays.h"
#include "../common/levels.h"
#include "../text/xxh64.h"
#include "hot_rows.h"
#include "row_messages.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace dqrm {
namespace {

using Numbers = Array<const int64_t>;
using Rows = Array<const float, 2>;
template <typename T>
using Maybe = std::optional<T>;

void require(bool holds, const char* otherwise) {
  if (!holds) throw std::invalid_argument(otherwise);
}

template <typename T>
int64_t length(const T& array) {
  return int64_t(array.shape(0));
}

RowParts row_parts(const Numbers& rows, const Rows& values, const Maybe<Numbers>& more_rows,
                   const Maybe<Rows>& more_values) {
  require(length(values) == length(rows), "values: one row a row");
  require(more_rows.has_value() == more_values.has_value(), "more_rows: with more_values");
  if (!more_rows) return {rows.data(), values.data(), length(rows), nullptr, nullptr, 0};
  require(length(*more_values) == length(*more_rows) &&
              more_values->shape(1) == values.shape(1),
          "more_values: one row a row");
  return {rows.data(),       values.data(),       length(rows),
          more_rows->data(), more_values->data(), length(*more_rows)};
}

RowFormat row_format(int64_t dim, int bits, int64_t stride, int64_t offset) {
  require(dim > 0 && (bits == 32 || bits == 16 || bits == 8 || bits == 4),
          "dim must be positive, bits 32, 16, 8 or 4");
  require(stride > 0 && offset >= 0 && offset < stride, "offset: must be below the stride");
  return {dim, bits, {stride, offset}};
}

const CodeLoops& loops_of(int bits, const std::string& level) {
  return bits >= 16 ? DQRM_LOOPS_AT(level_named(level), float_loops)
                    : DQRM_LOOPS_AT(level_named(level), code_loops);
}

void bind_order(const Numbers& rows, const Rows& values, const Numbers& more_rows,
                const Rows& more_values, const Array<int64_t>& order,
                const Array<int64_t>& counts) {
  const RowParts parts = row_parts(rows, values, more_rows, more_values);
  require(length(order) == parts.all(), "order: one for each row");
  require(length(counts) > 0, "counts: one for each group");
  for (int64_t i = 0; i < parts.all(); ++i) require(parts.row(i) >= 0, "rows: negative");
  const nb::gil_scoped_release release;
  order_rows(parts, length(counts), order.data(), counts.data());
}

std::pair<int64_t, int64_t> bind_encode(const Numbers& rows, const Rows& values,
                                        const Maybe<Numbers>& more_rows,
                                        const Maybe<Rows>& more_values,
                                        const Maybe<Numbers>& order, const Maybe<Numbers>& slots,
                                        const Maybe<Array<float, 2>>& residual, int bits,
                                        int64_t stride, int64_t offset, Maybe<uint64_t> key,
                                        const Array<uint8_t>& out, int threads,
                                        const std::string& level) {
  const RowParts parts = row_parts(rows, values, more_rows, more_values);
  const RowFormat format = row_format(int64_t(values.shape(1)), bits, stride, offset);
  const int64_t picked = order ? length(*order) : parts.all();
  require(length(out) >= packed_keys_bound(picked) + picked * format.row_bytes(),
          "out: too small for these rows");
  const auto inside = [](const Numbers& numbers, int64_t least, int64_t end) {
    return std::all_of(numbers.data(), numbers.data() + length(numbers),
                       [=](int64_t number) { return number >= least && number < end; });
  };
  require(!order || inside(*order, 0, parts.all()), "order: outside the rows");
  RowResiduals residuals{nullptr, nullptr};
  if (slots) {
    require(residual && residual->shape(1) == values.shape(1), "residual: rows like values");
    require(length(*slots) == parts.count && inside(*slots, -1, length(*residual)),
            "slots: one for each row, inside residual");
    residuals = {slots->data(), residual->data()};
  }
  const Rounding rounding{key.has_value(), key.value_or(0), nullptr, 0};
  const CodeLoops& loops = loops_of(bits, level);
  const nb::gil_scoped_release release;
  const Encoded encoded =
      encode_row_message(loops, format, parts, order ? order->data() : nullptr, picked, residuals,
                         rounding, out.data(), threads);
  return {encoded.bytes, encoded.not_finite};
}

// messages: [W, 4], where each begins in `bytes`, its size, its rows, and the offset of its stride.
int64_t bind_merge(const Array<const uint8_t>& bytes, const Array<const int64_t, 2>& messages,
                   int bits, int64_t stride, int64_t limit, float alpha,
                   const Array<int64_t>& out_rows, const Array<float, 2>& out_values, int threads,
                   const std::string& level) {
  const RowFormat format = row_format(int64_t(out_values.shape(1)), bits, stride, 0);
  require(messages.shape(1) == 4, "messages: begin, size, rows and offset of each");
  std::vector<RowPayload> payloads;
  int64_t all = 0;
  for (int64_t w = 0; w < length(messages); ++w) {
    const int64_t* message = messages.data() + 4 * w;
    const int64_t begin = message[0], size = message[1], rows = message[2];
    require(begin >= 0 && size >= 0 && begin <= length(bytes) && size <= length(bytes) - begin,
            "messages: outside bytes");
    require(rows >= 0 && message[3] >= 0 && message[3] < stride, "messages: no such rows");
    payloads.push_back({bytes.data() + begin, size, rows, message[3]});
    all += rows;
  }
  require(length(out_rows) >= all && length(out_values) >= all, "out: room for every row");
  const CodeLoops& loops = loops_of(bits, level);
  const nb::gil_scoped_release release;
  return merge_row_messages(loops, format, payloads, limit, alpha, out_rows.data(),
                            out_values.data(), threads);
}

int64_t bind_place(const Array<int64_t>& hot_rows, const Array<int16_t>& uses,
                   const Array<float, 2>& values, const Numbers& rows,
                   const Array<int64_t>& slots, const Array<int64_t>& evicted_rows,
                   const Array<float, 2>& evicted_values) {
  const int64_t size = length(hot_rows);
  const int64_t sets = size / HotRows::kWays;
  require(sets > 0 && sets * HotRows::kWays == size && std::has_single_bit(uint64_t(sets)),
          "hot_rows: a power of two, four at least");
  require(length(uses) == size && length(values) == size, "uses, values: one for each slot");
  require(length(slots) == length(rows), "slots: one for each row");
  require(length(evicted_values) == length(evicted_rows) &&
              evicted_values.shape(1) == values.shape(1),
          "evicted_values: rows like values");
  for (int64_t i = 0; i < length(rows); ++i) {
    require(rows.data()[i] > (i == 0 ? -1 : rows.data()[i - 1]),
            "rows: must ascend without repeats, none negative");
  }
  const nb::gil_scoped_release release;
  return place_rows({hot_rows.data(), reinterpret_cast<uint16_t*>(uses.data()), values.data(),
                     size, int64_t(values.shape(1))},
                    rows.data(), length(rows), slots.data(),
                    {evicted_rows.data(), evicted_values.data(), length(evicted_rows)});
}

std::pair<int64_t, int64_t> bind_select(const Array<const float>& values, float threshold,
                                        const Array<int64_t>& indices, const std::string& level) {
  const SelectLoops& loops = DQRM_LOOPS_AT(level_named(level), select_loops);
  const nb::gil_scoped_release release;
  const Selected found = loops.select(values.data(), length(values), threshold, length(indices),
                                      indices.data());
  return {found.count, found.not_finite};
}

uint64_t bind_hash(const Array<const uint8_t>& bytes) {
  const nb::gil_scoped_release release;
  return xxh64(bytes.data(), size_t(length(bytes)));
}

}  // namespace

void bind_row_messages(nb::module_& module) {
  module.def("order_rows", &bind_order, "rows"_a, "values"_a, "more_rows"_a, "more_values"_a,
             "order"_a, "counts"_a,
             nb::sig("def order_rows(rows: object, values: object, more_rows: object, "
                     "more_values: object, order: object, counts: object) -> None"));
  module.def("encode_row_message", &bind_encode, "rows"_a, "values"_a, "more_rows"_a.none(),
             "more_values"_a.none(), "order"_a.none(), "slots"_a.none(), "residual"_a.none(),
             "bits"_a, "stride"_a, "offset"_a, "key"_a.none(), "out"_a, "threads"_a, "level"_a,
             nb::sig("def encode_row_message(rows: object, values: object, "
                     "more_rows: object | None, more_values: object | None, "
                     "order: object | None, slots: object | None, residual: object | None, "
                     "bits: int, stride: int, offset: int, key: int | None, out: object, "
                     "threads: int, level: str) -> tuple[int, int]"));
  module.def("merge_row_messages", &bind_merge, "bytes"_a, "messages"_a, "bits"_a, "stride"_a,
             "limit"_a, "alpha"_a, "out_rows"_a, "out_values"_a, "threads"_a, "level"_a,
             nb::sig("def merge_row_messages(bytes: object, messages: object, bits: int, "
                     "stride: int, limit: int, alpha: float, out_rows: object, "
                     "out_values: object, threads: int, level: str) -> int"));
  module.def("place_rows", &bind_place, "hot_rows"_a, "uses"_a, "values"_a, "rows"_a, "slots"_a,
             "evicted_rows"_a, "evicted_values"_a,
             nb::sig("def place_rows(hot_rows: object, uses: object, values: object, "
                     "rows: object, slots: object, evicted_rows: object, "
                     "evicted_values: object) -> int"));
  module.def("select_large", &bind_select, "values"_a, "threshold"_a, "indices"_a, "level"_a,
             nb::sig("def select_large(values: object, threshold: float, indices: object, "
                     "level: str) -> tuple[int, int]"));
  module.def("hash_bytes", &bind_hash, "bytes"_a, nb::sig("def hash_bytes(bytes: object) -> int"));
}

}  // namespace dqrm
