#include "table_batch.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <new>
#include <stdexcept>

#include "../common/parallel.h"

namespace dqrm {
namespace {

// Ids that are worth waking a thread for: about 50 microseconds of work.
constexpr int64_t kIdsPerThread = 4096;

// Outputs too large for the caches to keep until someone reads them are written past them: a line
// need not be read first, and the tables' rows stay. From 8 MiB on, measured: 0.7 of the time at
// 13 MiB, no gain at 3.
constexpr int64_t kStreamedBytes = 8 << 20;
constexpr int64_t kLineBytes = 64;

int useful_threads(int threads, int64_t ids) {
  return int(std::clamp<int64_t>(ids / kIdsPerThread, 1, std::max(threads, 1)));
}

Collector& collector() {
  thread_local Collector collector;
  return collector;
}

// A share of one table's work.
struct Part {
  int table;
  int64_t part, parts;
};

// Smallest range a scale is made of, as SMALLEST_MAX_ABS of dqrm.compress.grids.
constexpr float kSmallestMaxAbs = 1e-8f;

}  // namespace

TableBatch::TableBatch(Storage storage, float* scales, std::vector<TableSpec> tables, bool by_row,
                       bool mean, bool clip, bool exact, const LookupLoops& lookup,
                       const UpdateLoops& update)
    : storage_(storage),
      scales_(scales),
      specs_(std::move(tables)),
      starts_{0},
      by_row_(by_row),
      mean_(mean),
      clip_(clip),
      lookup_(lookup),
      update_(update),
      maxima_(specs_.size()) {
  for (size_t table = 0; table < specs_.size(); ++table) {
    starts_.push_back(starts_.back() + specs_[table].rows);
    if (exact && !by_row && specs_[table].largest != 0.0f) {
      maxima_[table].emplace(specs_[table].rows);
    }
  }
}

TableView TableBatch::view(int table) const {
  const float largest = specs_[size_t(table)].largest;
  const Grid grid = largest == 0.0f ? Grid::none : by_row_ ? Grid::row : Grid::table;
  return {starts_[size_t(table)], grid, largest, scales_[table]};
}

Bags TableBatch::bags(const Lookups& lookups, int table) const {
  Bags bags{lookups.ids, lookups.wide, mean_, nullptr, lookups.weights, 0, 0};
  bags.begin = table * lookups.batch;
  bags.end = bags.begin + lookups.batch;
  if (lookups.offsets != nullptr) {
    bags.offsets = lookups.offsets + bags.begin;
    bags.begin = bags.offsets[0];
    bags.end = bags.offsets[lookups.batch];
  }
  return bags;
}

BagGradient TableBatch::gradient(const Lookups& lookups, const Bags& bags, int table,
                                 const float* grad, int64_t stride) const {
  return {grad + int64_t(table) * storage_.dim, stride,
          lookups.weights != nullptr ? lookups.weights + bags.begin : nullptr,
          mean_ ? bags.offsets : nullptr, clip_};
}

Bounds TableBatch::bounds(int table) {
  std::optional<Maxima>& maxima = maxima_[size_t(table)];
  return maxima ? maxima->bounds() : Bounds{{}, 0, nullptr};
}

Ahead TableBatch::ahead(int table, const RuleStep& step) {
  const int64_t start = starts_[size_t(table)];
  Ahead ahead{{}, 0, nullptr};
  const auto add = [&](const void* memory, int64_t bytes) {
    ahead.memory[ahead.count++] = {static_cast<const char*>(memory) + start * bytes, bytes};
  };
  add(storage_.memory, storage_.row_bytes);
  if (step.rule == Rule::adagrad) {
    add(step.first, storage_.state_bytes);
  } else if (step.rule == Rule::adam) {
    add(step.first, int64_t(storage_.dim) * storage_.state_bytes);
    add(step.second, int64_t(storage_.dim) * storage_.state_bytes);
  }
  if (maxima_[size_t(table)]) ahead.bounds = bounds(table).level[0];
  return ahead;
}

int TableBatch::table_of(int64_t row) const {
  return int(std::upper_bound(starts_.begin(), starts_.end(), row) - starts_.begin()) - 1;
}

int64_t TableBatch::maxima_bytes() const {
  int64_t bytes = 0;
  for (const std::optional<Maxima>& maxima : maxima_) bytes += maxima ? maxima->bytes() : 0;
  return bytes;
}

void TableBatch::check(const Lookups& lookups) const {
  if (lookups.offsets != nullptr) {
    const int64_t count = tables() * lookups.batch + 1;
    const int64_t at = lookup_.first_descent(lookups.offsets, count);
    if (at < count) {
      throw std::invalid_argument("offsets decrease after bag " + std::to_string(at - 1));
    }
  }
  for (int table = 0; table < tables(); ++table) {
    const Bags own = bags(lookups, table);
    const int64_t count = own.end - own.begin;
    if (count > INT32_MAX) {
      throw std::invalid_argument("more than 2147483647 ids of one table in a batch");
    }
    const TableSpec& spec = specs_[size_t(table)];
    const char* ids = static_cast<const char*>(own.ids) + own.begin * (own.wide ? 8 : 4);
    const int64_t at = lookup_.first_outside(ids, own.wide, count, spec.rows);
    if (at < count) {
      int64_t id;
      int32_t narrow;
      if (own.wide) {
        std::memcpy(&id, ids + 8 * at, 8);
      } else {
        std::memcpy(&narrow, ids + 4 * at, 4);
        id = narrow;
      }
      throw OutsideTable{"id " + std::to_string(id) + " is outside table '" + spec.name + "' of " +
                         std::to_string(spec.rows) + " rows"};
    }
  }
}

void TableBatch::look_up(const Lookups& lookups, Output out, int threads) const {
  threads = useful_threads(threads, lookups.count);
  // Chunks of samples, so that few tables keep many threads busy as well.
  const int64_t chunks = std::clamp<int64_t>(
      threads > 1 ? (4 * threads + tables() - 1) / tables() : 1, 1, std::max<int64_t>(lookups.batch, 1));
  const int64_t row_bytes = int64_t(storage_.dim) * 4;
  out.streamed = lookups.batch * tables() * row_bytes >= kStreamedBytes &&
                 row_bytes % kLineBytes == 0 && out.stride * 4 % kLineBytes == 0 &&
                 reinterpret_cast<uintptr_t>(out.data) % kLineBytes == 0;
  auto part = [&](int64_t number) {
    const int table = int(number / chunks);
    const int64_t chunk = number % chunks;
    lookup_.look_up(storage_, view(table), bags(lookups, table),
                    {out.data + int64_t(table) * storage_.dim, out.stride, out.streamed},
                    lookups.batch * chunk / chunks, lookups.batch * (chunk + 1) / chunks);
  };
  parallel_for(threads, tables() * chunks, part);
}

void TableBatch::update(const Lookups& lookups, const float* grad, int64_t stride,
                        const RuleStep& step, int threads) {
  threads = useful_threads(threads, lookups.count);
  std::vector<Part> work;
  for (int table = 0; table < tables(); ++table) {
    const Bags own = bags(lookups, table);
    const int64_t count = own.end - own.begin;
    // A table with much of the work is shared out by owner of rows.
    const int64_t parts =
        threads > 1 ? std::max<int64_t>(1, 4 * threads * count / lookups.count) : 1;
    for (int64_t part = 0; part < parts; ++part) work.push_back({table, part, parts});
  }
  auto part = [&](int64_t number) {
    const auto [table, index, parts] = work[size_t(number)];
    const Bags own = bags(lookups, table);
    const Bounds kept = bounds(table);
    const TouchedRows touched = collector().collect(
        own, lookups.batch, specs_[size_t(table)].rows, index, parts, ahead(table, step));
    update_.update(storage_, view(table), touched, gradient(lookups, own, table, grad, stride),
                   kept, step);
  };
  parallel_for(threads, int64_t(work.size()), part);
  settle_scales();
}

SummedGradient TableBatch::row_gradient(const Lookups& lookups, const float* grad, int64_t stride,
                                        int threads) const {
  threads = useful_threads(threads, lookups.count);
  struct Own {
    std::vector<TouchedRow> rows;
    std::vector<int32_t> next, bag;
    int64_t before;
  };
  std::vector<Own> touched(specs_.size());
  auto collect = [&](int64_t table) {
    const Bags own = bags(lookups, int(table));
    const TouchedRows found = collector().collect_sorted(own, lookups.batch,
                                                         specs_[size_t(table)].rows);
    const size_t ids = size_t(own.end - own.begin);
    Own& kept = touched[size_t(table)];
    kept.rows.assign(found.rows, found.rows + found.count);
    kept.next.assign(found.next, found.next + ids);
    if (found.bag != nullptr) kept.bag.assign(found.bag, found.bag + ids);
  };
  parallel_for(threads, tables(), collect);

  SummedGradient summed;
  int64_t count = 0;
  for (Own& own : touched) {
    own.before = count;
    count += int64_t(own.rows.size());
  }
  summed.rows.resize(size_t(count));
  const size_t bytes = size_t(std::max<int64_t>(count, 1)) * size_t(storage_.dim) * sizeof(float);
  summed.values = static_cast<float*>(std::aligned_alloc(64, (bytes + 63) / 64 * 64));
  if (summed.values == nullptr) throw std::bad_alloc();
  auto sum = [&](int64_t table) {
    const Own& own = touched[size_t(table)];
    const int64_t start = starts_[size_t(table)];
    for (size_t u = 0; u < own.rows.size(); ++u) {
      summed.rows[size_t(own.before) + u] = start + own.rows[u].row;
    }
    const Bags ids = bags(lookups, int(table));
    const TouchedRows rows{own.rows.data(), int64_t(own.rows.size()), own.next.data(),
                           ids.offsets != nullptr ? own.bag.data() : nullptr};
    update_.sum_gradients(storage_, view(int(table)), rows,
                          gradient(lookups, ids, int(table), grad, stride),
                          summed.values + own.before * storage_.dim);
  };
  parallel_for(threads, tables(), sum);
  return summed;
}

void TableBatch::check_ascending(const int64_t* rows, int64_t count) const {
  require_inside(rows, count);
  for (int64_t u = 0; u < count; ++u) {
    if (u > 0 && rows[u] <= rows[u - 1]) {
      throw std::invalid_argument("rows must ascend without repeats; row " +
                                  std::to_string(rows[u]) + " follows row " +
                                  std::to_string(rows[u - 1]));
    }
  }
}

void TableBatch::apply(const int64_t* rows, int64_t count, const float* values,
                       const RuleStep& step, int threads) {
  threads = useful_threads(threads, count);
  // Runs of rows of one table; a run never ends inside a block.
  struct Run {
    int table;
    int64_t begin, end;
  };
  std::vector<Run> runs;
  const int64_t longest = threads > 1 ? std::max<int64_t>(1, count / (4 * threads)) : count;
  for (int64_t begin = 0; begin < count;) {
    const int table = table_of(rows[begin]);
    const int64_t start = starts_[size_t(table)], stop = starts_[size_t(table) + 1];
    int64_t end = begin + 1;
    while (end < count && rows[end] < stop &&
           (end - begin < longest ||
            (rows[end] - start) >> kFanoutBits == (rows[end - 1] - start) >> kFanoutBits)) {
      ++end;
    }
    runs.push_back({table, begin, end});
    begin = end;
  }
  auto part = [&](int64_t number) {
    const auto [table, begin, end] = runs[size_t(number)];
    thread_local std::vector<TouchedRow> own;
    own.resize(size_t(end - begin));
    for (int64_t u = begin; u < end; ++u) {
      const int32_t number = int32_t(u - begin);
      own[size_t(number)] = {rows[u] - starts_[size_t(table)], number, number};
    }
    const TouchedRows touched{own.data(), end - begin, nullptr, nullptr};
    const BagGradient gradient{values + begin * storage_.dim, storage_.dim, nullptr, nullptr,
                               false};
    update_.update(storage_, view(table), touched, gradient, bounds(table), step);
  };
  parallel_for(threads, int64_t(runs.size()), part);
  settle_scales();
}

void TableBatch::require_inside(const int64_t* rows, int64_t count) const {
  for (int64_t u = 0; u < count; ++u) {
    if (rows[u] < 0 || rows[u] >= starts_.back()) {
      throw std::invalid_argument("row " + std::to_string(rows[u]) + " is outside the " +
                                  std::to_string(starts_.back()) + " rows of all tables");
    }
  }
}

void TableBatch::write_rows(const int64_t* rows, int64_t count, const float* values, int threads) {
  require_inside(rows, count);
  threads = useful_threads(threads, count);
  const int64_t parts = threads > 1 ? 4 * threads : 1;
  auto part = [&](int64_t number) {
    const int64_t begin = count * number / parts, end = count * (number + 1) / parts;
    update_.write_rows(storage_, rows + begin, end - begin, values + begin * storage_.dim);
  };
  parallel_for(threads, parts, part);
}

void TableBatch::rows_changed(const int64_t* rows, int64_t count) {
  require_inside(rows, count);
  for (int64_t u = 0; u < count; ++u) {
    const int table = table_of(rows[u]);
    const int64_t start = starts_[size_t(table)];
    std::optional<Maxima>& maxima = maxima_[size_t(table)];
    if (maxima) maxima->row_written(storage_, start, lookup_, rows[u] - start);
  }
  settle_scales();
}

void TableBatch::rebuild(int threads) {
  constexpr int64_t kRowsPerPart = 1 << 18;
  std::vector<Part> work;
  for (int table = 0; table < tables(); ++table) {
    if (!maxima_[size_t(table)]) continue;
    const int64_t parts = 1 + specs_[size_t(table)].rows / kRowsPerPart;
    for (int64_t part = 0; part < parts; ++part) work.push_back({table, part, parts});
  }
  auto scan = [&](int64_t number) {
    const auto [table, part, parts] = work[size_t(number)];
    maxima_[size_t(table)]->scan(storage_, starts_[size_t(table)], lookup_, part, parts);
  };
  // A thread that would scan less than one large part is not worth waking.
  threads = int(std::clamp<int64_t>(starts_.back() / kRowsPerPart, 1, std::max(threads, 1)));
  parallel_for(threads, int64_t(work.size()), scan);
  for (std::optional<Maxima>& maxima : maxima_) {
    if (maxima) maxima->finish_scan();
  }
  settle_scales();
}

void TableBatch::settle_scales() {
  for (int table = 0; table < tables(); ++table) {
    std::optional<Maxima>& maxima = maxima_[size_t(table)];
    if (!maxima) continue;
    const float most = maxima->settled(storage_, starts_[size_t(table)], lookup_);
    scales_[table] = std::max(most, kSmallestMaxAbs) / specs_[size_t(table)].largest;
  }
}

}  // namespace dqrm
