#include "parse.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>

#include "numbers.h"
#include "xxh64.h"

namespace dqrm {
namespace {

// Rows of a block. Every field of it walks over the block's text and ends again, so they should
// stay in the first cache: on Criteo rows, hashed, Zen 4, 2026-11, 64 and 128 rows gave 8.1 million
// rows a CPU-second, 256 gave 7.2, 512 gave 6.8.
constexpr uint32_t kBlockRows = 128;

// log1p of 0, 1, 2, ... as float. Filled by the very function that larger values go through.
constexpr uint32_t kLogTableSize = 1 << 16;

float log1p_float(double value) { return value > 0.0 ? float(std::log1p(value)) : 0.0f; }

const float* log_table() {
  static const std::vector<float> table = [] {
    std::vector<float> values(kLogTableSize);
    for (uint32_t i = 0; i < kLogTableSize; ++i) values[i] = log1p_float(i);
    return values;
  }();
  return table.data();
}

size_t count_role(const Plan& plan, Role role) {
  return size_t(std::count_if(plan.fields.begin(), plan.fields.end(),
                              [role](const Field& field) { return field.role == role; }));
}

class Parser {
 public:
  Parser(const Plan& plan, const Loops& loops, size_t max_malformed)
      : plan_(plan),
        loops_(loops),
        max_malformed_(max_malformed),
        block_(loops, plan.separators, uint32_t(plan.fields.size()), kBlockRows),
        bad_rows_(kBlockRows),
        out_(plan) {
    numeric_missing_.resize(out_.dense.columns());
  }

  ParsedRows run(const uint8_t* text, size_t bytes);

 private:
  void parse_region(const uint8_t* text, size_t bytes, uint64_t origin);
  void parse_block();
  // The fields that can be wrong. False if some are; their rows are in bad_rows_.
  bool parse_numbers(const Rows& rows);
  void parse_label(const Rows& rows, uint32_t field, float* out);
  void parse_dense(const Rows& rows, uint32_t field, float* out, int64_t* missing);
  void parse_time(const Rows& rows, uint32_t field, double* out);
  void parse_categories(const Rows& rows);
  void parse_lists(const Rows& rows, uint32_t field, size_t list, size_t dictionary);
  void mark_bad(uint32_t row) {
    bad_rows_[row] = 1;
    any_bad_ = true;
  }
  void reserve(size_t rows);
  size_t estimate_rows(const uint8_t* text, size_t bytes) const;

  const Plan& plan_;
  const Loops& loops_;
  const size_t max_malformed_;
  Block block_;
  // Scratch for one field of one block.
  std::array<uint64_t, kBlockRows> lanes_;
  std::array<uint32_t, kBlockRows> lengths_;
  std::array<uint64_t, kBlockRows> keys_;
  std::array<uint32_t, kBlockRows> values_;
  std::array<uint32_t, kBlockRows> others_;
  std::vector<uint8_t> bad_rows_;
  bool any_bad_ = false;
  std::vector<int64_t> numeric_missing_;
  std::vector<uint64_t> list_keys_;
  ParsedRows out_;
};

ParsedRows Parser::run(const uint8_t* text, size_t bytes) {
  reserve(estimate_rows(text, bytes));
  // The loops read up to kPadding bytes past the lines they are given. The last lines of the buffer
  // go through a copy with that room after it, and with a newline at its end.
  size_t direct = bytes < kPadding ? 0 : bytes - kPadding;
  while (direct > 0 && text[direct - 1] != '\n') --direct;
  parse_region(text, direct, 0);
  const size_t rest = bytes - direct;
  std::vector<uint8_t> tail(rest + 1 + kPadding);
  if (rest != 0) std::memcpy(tail.data(), text + direct, rest);
  const bool open = rest != 0 && tail[rest - 1] != '\n';
  if (open) tail[rest] = '\n';
  parse_region(tail.data(), rest + open, direct);
  out_.lines = block_.num_lines();
  return std::move(out_);
}

void Parser::parse_region(const uint8_t* text, size_t bytes, uint64_t origin) {
  for (size_t at = 0; at < bytes;) {
    at = block_.read(text, at, bytes, origin);
    parse_block();
  }
}

void Parser::parse_block() {
  if (block_.rows().count != 0) {
    reserve(out_.rows + block_.rows().count);
    while (!parse_numbers(block_.rows())) {
      std::vector<uint32_t> bad;
      for (uint32_t row = 0; row < block_.rows().count; ++row) {
        if (bad_rows_[row]) bad.push_back(row);
      }
      block_.remove(bad);
    }
    for (size_t i = 0; i < numeric_missing_.size(); ++i) out_.missing[i] += numeric_missing_[i];
    parse_categories(block_.rows());
    out_.rows += block_.rows().count;
  }
  out_.malformed_count += block_.malformed().size();
  for (const Line& line : block_.malformed()) {
    if (out_.malformed.size() == max_malformed_) break;
    out_.malformed.push_back(line);
  }
}

bool Parser::parse_numbers(const Rows& rows) {
  if (any_bad_) std::fill(bad_rows_.begin(), bad_rows_.end(), uint8_t{0});
  any_bad_ = false;
  size_t dense = 0;
  for (uint32_t field = 0; field < plan_.fields.size(); ++field) {
    switch (plan_.fields[field].role) {
      case Role::kLabel:
        parse_label(rows, field, out_.label.column(0) + out_.rows);
        break;
      case Role::kDense:
        parse_dense(rows, field, out_.dense.column(dense) + out_.rows, &numeric_missing_[dense]);
        ++dense;
        break;
      case Role::kTime:
        parse_time(rows, field, out_.time.column(0) + out_.rows);
        break;
      default:
        break;
    }
  }
  return !any_bad_;
}

void Parser::parse_label(const Rows& rows, uint32_t field, float* out) {
  loops_.extract(&rows, field, lanes_.data(), lengths_.data());
  for (uint32_t row = 0; row < rows.count; ++row) {
    const uint8_t digit = uint8_t(lanes_[row]);
    if (lengths_[row] == 1 && (digit | 1) == '1') {
      out[row] = float(digit & 1);
      continue;
    }
    uint32_t bytes;
    const uint8_t* text = block_.field(row, field, &bytes);
    if (dqrm::parse_label(text, bytes, &out[row]) != Parsed::kValue) mark_bad(row);
  }
}

void Parser::parse_dense(const Rows& rows, uint32_t field, float* out, int64_t* missing) {
  const bool log1p = plan_.fields[field].log1p;
  loops_.extract(&rows, field, lanes_.data(), lengths_.data());
  *missing = loops_.count_empty(lengths_.data(), rows.count);
  const uint32_t num_others =
      loops_.digits(lanes_.data(), lengths_.data(), rows.count, values_.data(), others_.data());
  if (log1p) {
    loops_.look_up(values_.data(), rows.count, log_table(), kLogTableSize, out);
    for (uint32_t row = 0; row < rows.count; ++row) {
      if (std::isnan(out[row])) out[row] = log1p_float(values_[row]);
    }
  } else {
    loops_.to_float(values_.data(), rows.count, out);
  }
  for (uint32_t i = 0; i < num_others; ++i) {
    const uint32_t row = others_[i];
    uint32_t bytes;
    const uint8_t* text = block_.field(row, field, &bytes);
    double value = 0.0;
    const Parsed parsed = parse_number(text, bytes, &value);
    *missing += parsed == Parsed::kMissing;
    const float result = log1p ? log1p_float(value) : float(value);
    if (parsed == Parsed::kMalformed || !std::isfinite(result)) mark_bad(row);
    out[row] = parsed == Parsed::kValue ? result : 0.0f;
  }
}

void Parser::parse_time(const Rows& rows, uint32_t field, double* out) {
  for (uint32_t row = 0; row < rows.count; ++row) {
    uint32_t bytes;
    const uint8_t* text = block_.field(row, field, &bytes);
    if (dqrm::parse_time(text, bytes, &out[row]) != Parsed::kValue) mark_bad(row);
  }
}

void Parser::parse_categories(const Rows& rows) {
  size_t one_hot = 0;
  size_t list = 0;
  for (uint32_t field = 0; field < plan_.fields.size(); ++field) {
    const Role role = plan_.fields[field].role;
    if (role == Role::kMultiHot) {
      parse_lists(rows, field, list, out_.ids.columns() + list);
      ++list;
    }
    if (role != Role::kCategorical) continue;
    loops_.extract(&rows, field, lanes_.data(), lengths_.data());
    out_.missing[out_.dense.columns() + one_hot] +=
        loops_.count_empty(lengths_.data(), rows.count);
    const uint32_t num_others =
        loops_.hash(lanes_.data(), lengths_.data(), rows.count, keys_.data(), others_.data());
    for (uint32_t i = 0; i < num_others; ++i) {
      uint32_t bytes;
      const uint8_t* text = block_.field(others_[i], field, &bytes);
      keys_[others_[i]] = xxh64(text, bytes);
    }
    int32_t* out = out_.ids.column(one_hot) + out_.rows;
    if (const uint32_t buckets = plan_.fields[field].buckets; buckets != 0) {
      loops_.bucket(keys_.data(), rows.count, buckets, out);
    } else {
      out_.dictionaries[one_hot].encode(keys_.data(), rows.count, out);
    }
    ++one_hot;
  }
}

void Parser::parse_lists(const Rows& rows, uint32_t field, size_t list, size_t dictionary) {
  Lists& lists = out_.lists[list];
  int64_t* offsets = lists.offsets.column(0) + out_.rows;
  const size_t before = lists.ids.size();
  int64_t& missing = out_.missing[out_.dense.columns() + dictionary];
  list_keys_.clear();
  offsets[0] = int64_t(before);
  for (uint32_t row = 0; row < rows.count; ++row) {
    uint32_t bytes;
    const uint8_t* item = block_.field(row, field, &bytes);
    const uint8_t* const end = item + bytes;
    const size_t items_before = list_keys_.size();
    while (item < end) {
      const uint8_t* stop = item;
      while (stop < end && *stop != plan_.list_separator) ++stop;
      if (stop != item) list_keys_.push_back(xxh64(item, size_t(stop - item)));
      item = stop + 1;
    }
    missing += list_keys_.size() == items_before;
    offsets[row + 1] = int64_t(before + list_keys_.size());
  }
  lists.ids.resize(before + list_keys_.size());
  if (const uint32_t buckets = plan_.fields[field].buckets; buckets != 0) {
    loops_.bucket(list_keys_.data(), list_keys_.size(), buckets, lists.ids.data() + before);
  } else {
    out_.dictionaries[dictionary].encode(list_keys_.data(), list_keys_.size(),
                                         lists.ids.data() + before);
  }
}

void Parser::reserve(size_t rows) {
  out_.label.reserve(rows, out_.rows);
  out_.dense.reserve(rows, out_.rows);
  out_.time.reserve(rows, out_.rows);
  out_.ids.reserve(rows, out_.rows);
  for (Lists& lists : out_.lists) lists.offsets.reserve(rows + 1, out_.rows + 1);
}

// From a few samples of the text, with some to spare: counting all lines would cost a tenth of the
// parsing.
size_t Parser::estimate_rows(const uint8_t* text, size_t bytes) const {
  constexpr size_t kSamples = 16;
  constexpr size_t kSampleBytes = 8192;
  size_t lines = 0;
  size_t seen = 0;
  if (bytes <= kSamples * kSampleBytes) {
    lines = size_t(std::count(text, text + bytes, '\n'));
    return lines + 1;
  }
  for (size_t i = 0; i < kSamples; ++i) {
    const uint8_t* sample = text + bytes / kSamples * i;
    lines += size_t(std::count(sample, sample + kSampleBytes, '\n'));
    seen += kSampleBytes;
  }
  const double rows = double(lines) / double(seen) * double(bytes);
  return size_t(rows * 1.02) + kBlockRows;
}

}  // namespace

ParsedRows::ParsedRows(const Plan& plan)
    : label(count_role(plan, Role::kLabel)),
      dense(count_role(plan, Role::kDense)),
      time(count_role(plan, Role::kTime)),
      ids(count_role(plan, Role::kCategorical)),
      lists(count_role(plan, Role::kMultiHot)),
      dictionaries(ids.columns() + lists.size()),
      missing(dense.columns() + dictionaries.size()) {}

ParsedRows parse(const uint8_t* text, size_t bytes, const Plan& plan, const Loops& loops,
                 size_t max_malformed) {
  return Parser(plan, loops, max_malformed).run(text, bytes);
}

}  // namespace dqrm
