// Python's view of parsing and hashing. Arguments are checked in dqrm/kernels/*.py, which says in
// people's words what is wrong; here only what would otherwise read or write out of bounds.
#include "bindings.h"

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <array>
#include <memory>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "../common/levels.h"
#include "dictionary.h"
#include "loops.h"
#include "parse.h"
#include "xxh64.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace dqrm {
namespace {

using KeyArray = nb::ndarray<const uint64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using OffsetArray = nb::ndarray<const int64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
template <typename T, int Dims = 1>
using Result = nb::ndarray<nb::numpy, T, nb::ndim<Dims>>;

// The bytes of a Python object; they cannot move or vanish while this exists.
class BufferView {
 public:
  explicit BufferView(nb::handle object) {
    if (PyObject_GetBuffer(object.ptr(), &view_, PyBUF_SIMPLE) != 0) throw nb::python_error();
  }
  ~BufferView() { PyBuffer_Release(&view_); }
  BufferView(const BufferView&) = delete;
  BufferView& operator=(const BufferView&) = delete;

  const uint8_t* data() const { return static_cast<const uint8_t*>(view_.buf); }
  size_t bytes() const { return size_t(view_.len); }

 private:
  Py_buffer view_;
};

template <typename T>
Result<T> take(std::vector<T>&& values) {
  auto* owned = new std::vector<T>(std::move(values));
  nb::capsule owner(owned, [](void* memory) noexcept {
    delete static_cast<std::vector<T>*>(memory);
  });
  return Result<T>(owned->data(), {owned->size()}, owner);
}

template <typename T>
T* take_memory(Columns<T>&& columns, nb::capsule* owner) {
  T* memory = columns.release();
  *owner = nb::capsule(memory, [](void* data) noexcept { std::free(data); });
  return memory;
}

template <typename T>
Result<T> take_column(Columns<T>&& columns, size_t rows) {
  nb::capsule owner;
  T* memory = take_memory(std::move(columns), &owner);
  return Result<T>(memory, {rows}, owner);
}

template <typename T>
Result<T, 2> take_matrix(Columns<T>&& columns, size_t rows) {
  nb::capsule owner;
  const size_t count = columns.columns();
  const int64_t stride = int64_t(columns.capacity());
  T* memory = take_memory(std::move(columns), &owner);
  return Result<T, 2>(memory, {count, rows}, owner, {stride, 1});
}

nb::dict parse_buffer(nb::object buffer, std::vector<std::tuple<int, uint32_t, bool>> fields,
                      int delimiter, int quote, int list_separator, size_t max_malformed,
                      const std::string& level) {
  Plan plan{{}, {uint8_t(delimiter), quote}, uint8_t(list_separator)};
  for (const auto& [role, buckets, log1p] : fields) {
    plan.fields.push_back({Role(role), buckets, log1p});
  }
  const Loops& loops = DQRM_LOOPS_AT(level_named(level), text_loops);
  const BufferView view(buffer);
  std::unique_ptr<ParsedRows> parsed;
  {
    nb::gil_scoped_release release;
    parsed = std::make_unique<ParsedRows>(
        parse(view.data(), view.bytes(), plan, loops, max_malformed));
  }
  const size_t rows = parsed->rows;
  nb::dict result;
  result["rows"] = rows;
  result["lines"] = parsed->lines;
  if (parsed->label.columns() != 0) {
    result["label"] = take_column(std::move(parsed->label), rows);
  }
  if (parsed->time.columns() != 0) result["time"] = take_column(std::move(parsed->time), rows);
  result["dense"] = take_matrix(std::move(parsed->dense), rows);
  result["ids"] = take_matrix(std::move(parsed->ids), rows);
  nb::list lists;
  for (Lists& list : parsed->lists) {
    if (rows == 0) list.offsets.column(0)[0] = 0;
    lists.append(nb::make_tuple(take_column(std::move(list.offsets), rows + 1),
                                take(std::move(list.ids))));
  }
  result["lists"] = lists;
  nb::list keys;
  for (Dictionary& dictionary : parsed->dictionaries) keys.append(take(dictionary.take_keys()));
  result["keys"] = keys;
  result["missing"] = take(std::move(parsed->missing));
  nb::list malformed;
  for (const Line& line : parsed->malformed) {
    malformed.append(nb::make_tuple(line.number, line.begin, line.end));
  }
  result["malformed"] = malformed;
  result["malformed_count"] = parsed->malformed_count;
  return result;
}

Result<uint64_t> hash_strings(OffsetArray offsets, nb::object data) {
  const BufferView view(data);
  const size_t count = offsets.shape(0) == 0 ? 0 : offsets.shape(0) - 1;
  const int64_t* bounds = offsets.data();
  std::vector<uint64_t> keys(count);
  bool inside = true;
  {
    nb::gil_scoped_release release;
    for (size_t i = 0; i < count && inside; ++i) {
      inside = bounds[i] >= 0 && bounds[i] <= bounds[i + 1] &&
               bounds[i + 1] <= int64_t(view.bytes());
      if (inside) keys[i] = xxh64(view.data() + bounds[i], size_t(bounds[i + 1] - bounds[i]));
    }
  }
  if (!inside) throw std::invalid_argument("offsets: must ascend within the bytes of data");
  return take(std::move(keys));
}

Result<int32_t> bucket(KeyArray keys, uint32_t buckets, const std::string& level) {
  const Loops& loops = DQRM_LOOPS_AT(level_named(level), text_loops);
  std::vector<int32_t> ids(keys.shape(0));
  nb::gil_scoped_release release;
  loops.bucket(keys.data(), ids.size(), buckets, ids.data());
  nb::gil_scoped_acquire acquire;
  return take(std::move(ids));
}

std::tuple<Result<int32_t>, Result<uint64_t>> encode(KeyArray keys) {
  std::vector<int32_t> ids(keys.shape(0));
  Dictionary dictionary;
  {
    nb::gil_scoped_release release;
    dictionary.encode(keys.data(), ids.size(), ids.data());
  }
  return {take(std::move(ids)), take(dictionary.take_keys())};
}

// The keys stay where they are; the array is held.
class HeldKeyTable {
 public:
  explicit HeldKeyTable(KeyArray keys) : keys_(keys), table_(keys.data(), keys.shape(0)) {}

  Result<int32_t> look_up(KeyArray query) const {
    std::vector<int32_t> ids(query.shape(0));
    {
      nb::gil_scoped_release release;
      table_.look_up(query.data(), ids.size(), ids.data());
    }
    return take(std::move(ids));
  }

 private:
  KeyArray keys_;
  KeyTable table_;
};

}  // namespace

void bind_text(nb::module_& module) {
  module.def("parse", &parse_buffer, "buffer"_a, "fields"_a, "delimiter"_a, "quote"_a,
             "list_separator"_a, "max_malformed"_a, "level"_a,
             nb::sig("def parse(buffer: object, fields: collections.abc.Sequence[tuple[int, int, bool]], "
                     "delimiter: int, quote: int, list_separator: int, max_malformed: int, "
                     "level: str) -> dict[str, typing.Any]"));
  module.def("hash_strings", &hash_strings, "offsets"_a, "data"_a);
  module.def("bucket", &bucket, "keys"_a, "buckets"_a, "level"_a);
  module.def("encode", &encode, "keys"_a);
  nb::class_<HeldKeyTable>(module, "KeyTable")
      .def(nb::init<KeyArray>(), "keys"_a)
      .def("look_up", &HeldKeyTable::look_up, "query"_a);
}

}  // namespace dqrm
