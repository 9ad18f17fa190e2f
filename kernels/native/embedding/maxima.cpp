#include "maxima.h"

#include <algorithm>
#include <cmath>

namespace dqrm {

Maxima::Maxima(int64_t rows) : rows_(rows) {
  int64_t nodes = rows;
  do {
    nodes = (nodes + kFanout - 1) / kFanout;
    levels_.emplace_back(size_t(nodes), 0.0f);
  } while (nodes > 1);
}

Bounds Maxima::bounds() {
  Bounds bounds{{}, int(levels_.size()), &unsettled_};
  for (size_t level = 0; level < levels_.size(); ++level) {
    bounds.level[level] = levels_[level].data();
  }
  return bounds;
}

int64_t Maxima::bytes() const {
  size_t nodes = 0;
  for (const std::vector<float>& level : levels_) nodes += level.size();
  return int64_t(nodes * sizeof(float));
}

float Maxima::block_max(const Storage& storage, int64_t first_row, const LookupLoops& loops,
                        int64_t block) const {
  const int64_t begin = block << kFanoutBits;
  return loops.largest(storage, first_row + begin, std::min<int64_t>(kFanout, rows_ - begin));
}

float Maxima::children_max(int64_t node, int level) const {
  const std::vector<float>& below = levels_[size_t(level) - 1];
  const size_t begin = size_t(node) << kFanoutBits;
  const size_t end = std::min(begin + kFanout, below.size());
  float most = 0.0f;
  for (size_t child = begin; child < end; ++child) most = std::max(most, std::fabs(below[child]));
  return most;
}

void Maxima::refresh_above(int64_t node, int level) {
  for (++level; level < int(levels_.size()); ++level) {
    node >>= kFanoutBits;
    levels_[size_t(level)][size_t(node)] = children_max(node, level);
  }
}

float Maxima::settled(const Storage& storage, int64_t first_row, const LookupLoops& loops) {
  if (unsettled_ == 0) return std::fabs(levels_.back()[0]);
  for (;;) {
    const float root = std::fabs(levels_.back()[0]);
    int64_t node = 0;
    for (size_t level = levels_.size() - 1; level-- > 0;) {
      node <<= kFanoutBits;
      while (std::fabs(levels_[level][size_t(node)]) != root) ++node;
    }
    float& bound = levels_[0][size_t(node)];
    if (!std::signbit(bound)) break;
    bound = block_max(storage, first_row, loops, node);
    refresh_above(node, 0);
  }
  unsettled_ = 0;
  return std::fabs(levels_.back()[0]);
}

void Maxima::scan(const Storage& storage, int64_t first_row, const LookupLoops& loops,
                  int64_t part, int64_t parts) {
  const int64_t blocks = int64_t(levels_[0].size());
  for (int64_t block = blocks * part / parts; block < blocks * (part + 1) / parts; ++block) {
    levels_[0][size_t(block)] = block_max(storage, first_row, loops, block);
  }
}

void Maxima::finish_scan() {
  for (int level = 1; level < int(levels_.size()); ++level) {
    std::vector<float>& nodes = levels_[size_t(level)];
    for (size_t node = 0; node < nodes.size(); ++node) {
      nodes[node] = children_max(int64_t(node), level);
    }
  }
  unsettled_ = 0;
}

void Maxima::row_written(const Storage& storage, int64_t first_row, const LookupLoops& loops,
                         int64_t row) {
  float& leaf = levels_[0][size_t(row >> kFanoutBits)];
  const float value = loops.largest(storage, first_row + row, 1);
  if (value > std::fabs(leaf)) {
    leaf = value;
    refresh_above(row >> kFanoutBits, 0);
  } else {
    leaf = -std::fabs(leaf);
    unsettled_ = 1;
  }
}

}  // namespace dqrm
