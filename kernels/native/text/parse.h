// Delimited text to columns.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "block.h"
#include "columns.h"
#include "dictionary.h"
#include "loops.h"

namespace dqrm {

// As in dqrm/kernels/plan.py.
enum class Role : uint8_t { kSkip, kLabel, kDense, kCategorical, kMultiHot, kTime };

struct Field {
  Role role;
  uint32_t buckets;
  bool log1p;
};

struct Plan {
  std::vector<Field> fields;
  Separators separators;
  uint8_t list_separator;
};

// Ids of one multi-hot field: row r has ids[offsets[r]] to ids[offsets[r + 1]].
struct Lists {
  Columns<int64_t> offsets{1};
  std::vector<int32_t> ids;
};

struct ParsedRows {
  explicit ParsedRows(const Plan& plan);

  uint64_t rows = 0;
  uint64_t lines = 0;
  Columns<float> label;
  Columns<float> dense;
  Columns<double> time;
  Columns<int32_t> ids;
  std::vector<Lists> lists;
  // Of each categorical, then each multi-hot field.
  std::vector<Dictionary> dictionaries;
  std::vector<int64_t> missing;
  std::vector<Line> malformed;
  uint64_t malformed_count = 0;
};

ParsedRows parse(const uint8_t* text, size_t bytes, const Plan& plan, const Loops& loops,
                 size_t max_malformed);

}  // namespace dqrm
