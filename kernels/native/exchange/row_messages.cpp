#include "row_messages.h"

#include <algorithm>
#include <limits>

#include "../common/parallel.h"
#include "first.h"

namespace dqrm {
namespace {

// Floats of the rows that are encoded, or summed, at a time: half of the first cache. Those with
// residuals take their place there a second time.
constexpr int64_t kChunkFloats = 4096, kCompensatedFloats = 1024;
constexpr int64_t kAhead = 24;  // Residuals that are fetched before they are needed.

int64_t chunk_rows(int64_t dim, int64_t floats = kChunkFloats) {
  return std::max<int64_t>(1, floats / dim);
}

// Calls function(begin, end) for chunks of [0, count).
template <typename Function>
void in_chunks(int threads, int64_t count, int64_t chunk, Function function) {
  auto part = [&](int64_t number) {
    function(number * chunk, std::min(count, (number + 1) * chunk));
  };
  parallel_for(threads, (count + chunk - 1) / chunk, part);
}

// Rows [begin, begin + count) of a message whose scales and codes begin at these places.
CodedRows coded(const RowFormat& format, uint8_t* scales, uint8_t* codes, int64_t begin,
                int64_t count) {
  return {count,
          format.dim,
          format.dim,
          format.bits,
          ScaleType::bfloat16,
          codes + begin * format.code_bytes(),
          scales + begin * (format.bits <= 8 ? 2 : 0)};
}

// Where the scales and the codes of a message lie behind its keys.
struct Body {
  uint8_t* scales;
  uint8_t* codes;

  Body(const RowFormat& format, uint8_t* behind_keys, int64_t count)
      : scales(behind_keys), codes(behind_keys + (format.bits <= 8 ? 2 * count : 0)) {}
};

struct Picked {
  const RowParts& parts;
  const int64_t* order;

  int64_t operator[](int64_t i) const { return order != nullptr ? order[i] : i; }
  int64_t row(int64_t i) const { return parts.row((*this)[i]); }
};

int64_t slot_of(const RowParts& parts, const RowResiduals& residuals, int64_t i) {
  return residuals.slots != nullptr && i < parts.count ? residuals.slots[i] : -1;
}

// Gathers rows [begin, end) of `all`, their residuals added, into `to`.
void gather(const RowFormat& format, const Picked& picked, const RowResiduals& residuals,
            int64_t begin, int64_t end, int64_t all, float* to) {
  const int64_t dim = format.dim;
  for (int64_t i = begin; i < end; ++i) {
    if (i + kAhead < all) {
      const int64_t ahead = slot_of(picked.parts, residuals, picked[i + kAhead]);
      if (ahead >= 0) __builtin_prefetch(residuals.values + ahead * dim, 1);
    }
    const int64_t slot = slot_of(picked.parts, residuals, picked[i]);
    const float* value = picked.parts.value(picked[i], dim);
    if (slot < 0) {
      std::copy_n(value, dim, to);
    } else {
      const float* residual = residuals.values + slot * dim;
      for (int64_t d = 0; d < dim; ++d) to[d] = value[d] + residual[d];
    }
    to += dim;
  }
}

constexpr int64_t kEnd = std::numeric_limits<int64_t>::max();

// The next of a message's rows, which end with kEnd, and where it is told its number in the union.
struct Cursor {
  const int64_t* row;
  int64_t* target;
};

// Writes the union of the rows of some messages and returns their number. Every message's next row
// is given the union's next number; it stays where the row is the smallest, and is overwritten later
// elsewhere. No branch depends on the rows.
int64_t unite(std::vector<Cursor>& cursors, int64_t* rows) {
  for (int64_t distinct = 0;; ++distinct) {
    int64_t row = kEnd;
    for (const Cursor& cursor : cursors) row = std::min(row, *cursor.row);
    if (row == kEnd) return distinct;
    rows[distinct] = row;
    for (Cursor& cursor : cursors) {
      *cursor.target = distinct;
      const bool taken = *cursor.row == row;
      cursor.row += taken;
      cursor.target += taken;
    }
  }
}

// The same for two messages, all in registers.
int64_t unite_two(Cursor one, Cursor other, int64_t* rows) {
  for (int64_t distinct = 0;; ++distinct) {
    const int64_t first = *one.row, second = *other.row;
    const int64_t row = std::min(first, second);
    if (row == kEnd) return distinct;
    rows[distinct] = row;
    *one.target = distinct;
    *other.target = distinct;
    one.row += first == row;
    one.target += first == row;
    other.row += second == row;
    other.target += second == row;
  }
}

}  // namespace

void order_rows(const RowParts& parts, int64_t groups, int64_t* order, int64_t* counts) {
  const int64_t all = parts.all();
  std::vector<int64_t> merged(static_cast<size_t>(all));
  int64_t one = 0, other = parts.count;
  std::fill_n(counts, groups, 0);
  for (int64_t i = 0; i < all; ++i) {
    const bool first =
        other == all || (one < parts.count && parts.rows[one] < parts.row(other));
    merged[size_t(i)] = first ? one++ : other++;
    ++counts[parts.row(merged[size_t(i)]) % groups];
  }
  std::vector<int64_t> next(static_cast<size_t>(groups));
  for (int64_t group = 1; group < groups; ++group) {
    next[size_t(group)] = next[size_t(group - 1)] + counts[group - 1];
  }
  for (const int64_t number : merged) order[next[size_t(parts.row(number) % groups)]++] = number;
}

Encoded encode_row_message(const CodeLoops& loops, const RowFormat& format, const RowParts& parts,
                           const int64_t* order, int64_t picked, const RowResiduals& residuals,
                           const Rounding& rounding, uint8_t* to, int threads) {
  const Picked rows{parts, order};
  const int64_t key_bytes =
      pack_keys([&](int64_t i) { return rows.row(i); }, picked, format.stride, to);
  if (key_bytes < 0) return {-1, -1};
  const Body body(format, to + key_bytes, picked);
  First not_finite;
  if (order == nullptr && parts.more_count == 0 && residuals.slots == nullptr) {
    const CodedRows all = coded(format, body.scales, body.codes, 0, picked);
    const Rounding of_rows{rounding.stochastic, rounding.key, parts.rows, 0};
    in_chunks(threads, picked, chunk_rows(format.dim), [&](int64_t begin, int64_t end) {
      const int64_t bad =
          loops.encode(all, parts.values, nullptr, false, of_rows, begin, end);
      if (bad != end) not_finite.report(bad);
    });
    const int64_t bad = not_finite.or_none();
    return {key_bytes + picked * format.row_bytes(), bad < 0 ? -1 : parts.rows[bad]};
  }
  const int64_t chunk = chunk_rows(format.dim, kCompensatedFloats);
  in_chunks(threads, picked, chunk, [&](int64_t begin, int64_t end) {
    thread_local std::vector<float> scratch;
    thread_local std::vector<int64_t> numbers;
    scratch.resize(size_t((end - begin) * format.dim));
    numbers.resize(size_t(end - begin));
    gather(format, rows, residuals, begin, end, picked, scratch.data());
    // Neighbours that are treated alike are encoded in one call.
    for (int64_t from = begin; from < end;) {
      const bool kept = slot_of(parts, residuals, rows[from]) >= 0;
      int64_t stop = from + 1;
      while (stop < end && (slot_of(parts, residuals, rows[stop]) >= 0) == kept) ++stop;
      for (int64_t i = from; !kept && i < stop; ++i) numbers[size_t(i - begin)] = rows.row(i);
      float* own = scratch.data() + (from - begin) * format.dim;
      const Rounding of_run{!kept && rounding.stochastic, rounding.key,
                            numbers.data() + (from - begin), 0};
      const int64_t bad = loops.encode(coded(format, body.scales, body.codes, from, stop - from),
                                       own, kept ? own : nullptr, false, of_run, 0, stop - from);
      if (bad != stop - from) not_finite.report(from + bad);
      for (int64_t i = from; kept && i < stop; ++i) {
        const float* lost = scratch.data() + (i - begin) * format.dim;
        std::copy_n(lost, format.dim,
                    residuals.values + slot_of(parts, residuals, rows[i]) * format.dim);
      }
      from = stop;
    }
  });
  const int64_t bad = not_finite.or_none();
  return {key_bytes + picked * format.row_bytes(), bad < 0 ? -1 : rows.row(bad)};
}

int64_t merge_row_messages(const CodeLoops& loops, const RowFormat& format,
                           const std::vector<RowPayload>& payloads, int64_t limit, float alpha,
                           int64_t* rows, float* values, int threads) {
  // Kept between calls: fresh memory takes longer to touch than to fill.
  struct Message {
    std::vector<int64_t> rows;     // one more than there are: kEnd
    std::vector<int64_t> targets;  // which row of the union each becomes
    int64_t key_bytes;
  };
  thread_local std::vector<Message> kept;
  std::vector<Message>& messages = kept;
  const size_t world = payloads.size();
  if (messages.size() < world) messages.resize(world);
  for (size_t w = 0; w < world; ++w) {
    const RowPayload& payload = payloads[w];
    Message& message = messages[w];
    // Absurd numbers of rows end here, before memory is asked for them.
    if (payload.count > 4 * payload.size) return -1 - int64_t(w);
    const size_t size = size_t(payload.count) + 1;
    if (message.rows.size() < size) {
      message.rows.resize(size);
      message.targets.resize(size);
    }
    message.key_bytes =
        unpack_keys(payload.bytes, payload.size, payload.count,
                    {format.stride.stride, payload.offset}, limit, message.rows.data());
    if (message.key_bytes < 0 ||
        message.key_bytes + payload.count * format.row_bytes() != payload.size) {
      return -1 - int64_t(w);
    }
    message.rows[size_t(payload.count)] = kEnd;
  }

  std::vector<Cursor> cursors;
  for (size_t w = 0; w < world; ++w) {
    cursors.push_back({messages[w].rows.data(), messages[w].targets.data()});
  }
  int64_t nowhere;
  if (world == 1) cursors.push_back({&kEnd, &nowhere});
  const int64_t distinct = cursors.size() == 2 ? unite_two(cursors[0], cursors[1], rows)
                                               : unite(cursors, rows);

  in_chunks(threads, distinct, chunk_rows(format.dim), [&](int64_t begin, int64_t end) {
    std::fill_n(values + begin * format.dim, (end - begin) * format.dim, 0.0f);
    for (size_t w = 0; w < world; ++w) {
      const int64_t* targets = messages[w].targets.data();
      const int64_t count = payloads[w].count;
      const int64_t from = std::lower_bound(targets, targets + count, begin) - targets;
      const int64_t to = std::lower_bound(targets + from, targets + count, end) - targets;
      uint8_t* behind = const_cast<uint8_t*>(payloads[w].bytes) + messages[w].key_bytes;
      const Body body(format, behind, count);
      loops.decode(coded(format, body.scales, body.codes, 0, count), values, targets, true, alpha,
                   from, to);
    }
  });
  return distinct;
}

}  // namespace dqrm
