#include "codecs.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>
#include <vector>

#include "../common/parallel.h"
#include "first.h"

namespace dqrm {
namespace {

// Values that one thread encodes in about 20 microseconds.
constexpr int64_t kValuesPerPart = 65536;

// Calls function(begin, end) for parts of [0, items), which hold `values` values in all.
template <typename Function>
void in_parts(int threads, int64_t items, int64_t values, Function function) {
  if (items == 0) return;
  const int64_t parts =
      threads > 1 ? std::clamp<int64_t>(values / kValuesPerPart, 1, std::min<int64_t>(items, 4 * threads))
                  : 1;
  auto part = [&](int64_t number) {
    function(items * number / parts, items * (number + 1) / parts);
  };
  parallel_for(threads, parts, part);
}

int64_t values_of(const CodedRows& rows) {
  return rows.rows == 0 ? 0 : (rows.rows - 1) * rows.dim + rows.last_dim;
}

float scale_of(double sum, int64_t count, bool squares) {
  const double mean = sum / double(count);
  return float(squares ? std::sqrt(mean) : mean);
}

// Encodes one block whose sum is known; returns whether it is finite.
bool encode_block(const SignLoops& loops, double sum, int64_t count, bool squares,
                  float* residual, uint8_t* bits, float* scale) {
  *scale = scale_of(sum, count, squares);
  if (!std::isfinite(*scale)) {
    *scale = std::numeric_limits<float>::quiet_NaN();
    std::fill_n(residual, count, 0.0f);
    std::memset(bits, 0, size_t((count + 7) / 8));
    return false;
  }
  loops.encode(residual, count, *scale, bits);
  return true;
}

}  // namespace

int64_t encode_rows(const CodeLoops& loops, const CodedRows& rows, const float* values,
                    float* residual, bool carried, const Rounding& rounding, int threads) {
  First not_finite;
  in_parts(threads, rows.rows, values_of(rows), [&](int64_t begin, int64_t end) {
    const int64_t row = loops.encode(rows, values, residual, carried, rounding, begin, end);
    if (row != end) not_finite.report(row);
  });
  return not_finite.or_none();
}

void decode_rows(const CodeLoops& loops, const CodedRows& rows, float* out,
                 const int64_t* targets, bool add, float alpha, int threads) {
  if (targets != nullptr &&
      std::adjacent_find(targets, targets + rows.rows, std::greater_equal<>()) !=
          targets + rows.rows) {
    threads = 1;
  }
  in_parts(threads, rows.rows, values_of(rows), [&](int64_t begin, int64_t end) {
    loops.decode(rows, out, targets, add, alpha, begin, end);
  });
}

int64_t encode_signs(const SignLoops& loops, const SignedBlocks& blocks, const float* gradient,
                     float* residual, bool squares, int threads) {
  First not_finite;
  const auto finish = [&](int64_t block, double sum, int64_t count) {
    float scale;
    const int64_t at = block * blocks.block;
    if (!encode_block(loops, sum, count, squares, residual + at, blocks.bits + at / 8, &scale)) {
      not_finite.report(block);
    }
    std::memcpy(blocks.scales + 4 * block, &scale, 4);
  };
  if (blocks.block <= kValuesPerPart) {
    in_parts(threads, blocks.blocks(), blocks.count, [&](int64_t begin, int64_t end) {
      for (int64_t block = begin; block < end; ++block) {
        const int64_t at = block * blocks.block;
        const int64_t count = std::min(blocks.block, blocks.count - at);
        finish(block, loops.compensate(gradient + at, residual + at, count, squares), count);
      }
    });
    return not_finite.or_none();
  }
  // A block that is too long for one cache is summed by chunks of it.
  std::vector<double> sums(size_t((blocks.count + kValuesPerPart - 1) / kValuesPerPart));
  for (int64_t block = 0; block < blocks.blocks(); ++block) {
    const int64_t at = block * blocks.block;
    const int64_t count = std::min(blocks.block, blocks.count - at);
    const int64_t chunks = (count + kValuesPerPart - 1) / kValuesPerPart;
    in_parts(threads, chunks, count, [&](int64_t begin, int64_t end) {
      for (int64_t chunk = begin; chunk < end; ++chunk) {
        const int64_t from = at + chunk * kValuesPerPart;
        const int64_t length = std::min(kValuesPerPart, at + count - from);
        sums[size_t(chunk)] =
            loops.compensate(gradient + from, residual + from, length, squares);
      }
    });
    double sum = 0.0;
    for (int64_t chunk = 0; chunk < chunks; ++chunk) sum += sums[size_t(chunk)];
    const float scale = scale_of(sum, count, squares);
    if (!std::isfinite(scale)) {
      finish(block, sum, count);
      continue;
    }
    std::memcpy(blocks.scales + 4 * block, &scale, 4);
    in_parts(threads, chunks, count, [&](int64_t begin, int64_t end) {
      const int64_t from = at + begin * kValuesPerPart;
      const int64_t to = std::min(at + end * kValuesPerPart, at + count);
      loops.encode(residual + from, to - from, scale, blocks.bits + from / 8);
    });
  }
  return not_finite.or_none();
}

void decode_signs(const SignLoops& loops, const SignedBlocks& blocks, float* out, bool add,
                  float alpha, int threads) {
  // Parts are runs of values that begin at a whole byte, wherever blocks begin.
  const int64_t pieces = (blocks.count + kValuesPerPart - 1) / kValuesPerPart;
  in_parts(threads, pieces, blocks.count, [&](int64_t begin, int64_t end) {
    const int64_t stop = std::min(end * kValuesPerPart, blocks.count);
    for (int64_t at = begin * kValuesPerPart; at < stop;) {
      const int64_t block = at / blocks.block;
      const int64_t next = std::min((block + 1) * blocks.block, stop);
      float scale;
      std::memcpy(&scale, blocks.scales + 4 * block, 4);
      loops.decode(blocks.bits + at / 8, next - at, alpha * scale, out + at, add);
      at = next;
    }
  });
}

}  // namespace dqrm
