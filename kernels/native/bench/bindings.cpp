#include "bindings.h"

#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>

#include <algorithm>
#include <stdexcept>
#include <string>

#include "../common/arrays.h"
#include "../common/levels.h"
#include "../common/parallel.h"
#include "gather.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace dqrm {
namespace {

// Rows that one thread takes at a time: enough that taking them costs nothing beside reading them.
constexpr int64_t kPartRows = 4096;

void gather_rows(Array<const uint8_t, 2> table, Array<const int64_t> rows, Array<uint8_t, 2> out,
                 int64_t ahead, int threads, const std::string& level) {
  const int64_t count = int64_t(rows.shape(0)), height = int64_t(table.shape(0));
  if (int64_t(out.shape(0)) != count) throw std::invalid_argument("out has not one row a number");
  if (ahead < 0) throw std::invalid_argument("ahead must not be negative");
  const GatherLoops& loops = DQRM_LOOPS_AT(level_named(level), gather_loops);
  const int64_t* numbers = rows.data();
  nb::gil_scoped_release release;
  if (!loops.inside(numbers, count, height)) throw std::out_of_range("a row number is outside the table");
  auto part = [&](int64_t number) {
    const int64_t begin = number * kPartRows;
    loops.gather(table.data(), numbers, begin, std::min(begin + kPartRows, count),
                 int64_t(table.shape(1)), int64_t(out.shape(1)), ahead, out.data());
  };
  parallel_for(threads, (count + kPartRows - 1) / kPartRows, part);
}

}  // namespace

void bind_bench(nb::module_& module) {
  module.def("gather_rows", &gather_rows, "table"_a, "rows"_a, "out"_a, "ahead"_a, "threads"_a,
             "level"_a,
             nb::sig("def gather_rows(table: object, rows: object, out: object, ahead: int, "
                     "threads: int, level: str) -> None"));
}

}  // namespace dqrm
