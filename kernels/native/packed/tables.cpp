#include "tables.h"

#include <algorithm>
#include <stdexcept>
#include <utility>

#include "../common/parallel.h"

namespace dqrm {
namespace {

// Look-ups in one part of the work: about 50 us of them.
constexpr int64_t kLookUpsPerPart = 8192;

// An output this large is not in the caches any more when it is read. Writing it past them saves
// fetching its lines first: 26 tables, 2048 samples of 64 numbers (13.6 MB) take 0.55 ms, not 0.75;
// with the interaction reading it afterwards the two take as long as before.
constexpr int64_t kStreamBytes = 8 << 20;

bool is_streamed(const PackedBatch& batch) {
  const int64_t float_bytes = sizeof(float);
  const bool whole_lines = batch.dim * float_bytes % kCacheLine == 0 &&
                           batch.sample_stride * float_bytes % kCacheLine == 0 &&
                           reinterpret_cast<uintptr_t>(batch.out) % kCacheLine == 0;
  return whole_lines && batch.samples * batch.num_tables * batch.dim * float_bytes >= kStreamBytes;
}

}  // namespace

PackedTables::PackedTables(std::vector<PackedTable> tables, std::vector<std::string> names,
                           int64_t dim, bool mean, Level level)
    : tables_(std::move(tables)),
      names_(std::move(names)),
      dim_(dim),
      mean_(mean),
      loops_(DQRM_LOOPS_AT(level, packed_loops)) {}

void PackedTables::look_up(PackedBatch batch, int64_t num_ids, int threads) const {
  batch.tables = tables_.data();
  batch.num_tables = size();
  batch.dim = dim_;
  batch.mean = mean_;
  batch.streamed = is_streamed(batch);
  if (batch.offsets != nullptr) check_offsets(batch, num_ids);
  check_ids(batch);
  if (batch.samples == 0) return;
  const int64_t per_sample = std::max<int64_t>(1, num_ids / batch.samples);
  const int64_t samples = std::max<int64_t>(1, kLookUpsPerPart / per_sample);
  auto part = [&](int64_t number) {
    const int64_t begin = number * samples;
    loops_.look_up(batch, begin, std::min(begin + samples, batch.samples));
  };
  parallel_for(threads, (batch.samples + samples - 1) / samples, part);
}

void PackedTables::check_offsets(const PackedBatch& batch, int64_t num_ids) const {
  const int64_t bags = batch.num_tables * batch.samples;
  const int64_t* offsets = batch.offsets;
  if (offsets[0] != 0 || offsets[bags] != num_ids) {
    throw std::invalid_argument(
        "offsets must hold num_tables * batch + 1 numbers from 0 to " + std::to_string(num_ids) +
        ", the number of indices; got numbers from " + std::to_string(offsets[0]) + " to " +
        std::to_string(offsets[bags]));
  }
  bool decreases = false;
  for (int64_t bag = 0; bag < bags; ++bag) decreases |= offsets[bag + 1] < offsets[bag];
  if (!decreases) return;
  int64_t bag = 0;
  while (offsets[bag + 1] >= offsets[bag]) ++bag;
  throw std::invalid_argument("offsets decrease after bag " + std::to_string(bag));
}

void PackedTables::check_ids(const PackedBatch& batch) const {
  for (int64_t table = 0; table < size(); ++table) {
    const int64_t first = table * batch.samples, last = first + batch.samples;
    const int64_t begin = batch.offsets == nullptr ? first : batch.offsets[first];
    const int64_t end = batch.offsets == nullptr ? last : batch.offsets[last];
    const void* ids = static_cast<const char*>(batch.ids) + begin * (batch.wide ? 8 : 4);
    const int64_t at = loops_.first_outside(ids, batch.wide, end - begin, tables_[table].rows);
    if (at == end - begin) continue;
    const int64_t id =
        batch.wide ? static_cast<const int64_t*>(ids)[at] : static_cast<const int32_t*>(ids)[at];
    throw std::out_of_range("id " + std::to_string(id) + " is outside table '" + names_[table] +
                            "' of " + std::to_string(tables_[table].rows) + " rows");
  }
}

}  // namespace dqrm
