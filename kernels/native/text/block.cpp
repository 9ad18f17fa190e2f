#include "block.h"

#include <algorithm>
#include <cstring>

namespace dqrm {
namespace {

// Bytes of a block: offsets in it are 32 bits, and a line of kMaxLineBytes must fit in.
constexpr size_t kMaxBlockBytes = 4 * kMaxLineBytes;

size_t find(const uint8_t* text, size_t bytes, uint8_t wanted) {
  const void* found = std::memchr(text, wanted, bytes);
  return found == nullptr ? bytes : size_t(static_cast<const uint8_t*>(found) - text);
}

size_t without_return(const uint8_t* text, size_t begin, size_t end) {
  return end > begin && text[end - 1] == '\r' ? end - 1 : end;
}

}  // namespace

Block::Block(const Loops& loops, Separators separators, uint32_t num_fields, uint32_t max_rows)
    : loops_(loops),
      separators_(separators),
      num_fields_(num_fields),
      ends_(size_t{num_fields} * max_rows + 64),
      newlines_(max_rows),
      begins_(max_rows),
      first_(max_rows),
      start_(max_rows),
      line_(max_rows) {}

void Block::scan(const uint8_t* text, size_t bytes) {
  scan_ = {ends_.data(), uint32_t(ends_.size()), newlines_.data(), uint32_t(newlines_.size()), 0, 0};
  loops_.scan(text, std::min(bytes, kMaxBlockBytes), separators_.delimiter, &scan_);
}

size_t Block::read(const uint8_t* text, size_t at, size_t bytes, uint64_t origin) {
  text += at;
  bytes -= at;
  origin_ = origin + at;
  first_line_ = num_lines_;
  num_rows_ = 0;
  malformed_.clear();
  scan(text, bytes);
  if (scan_.num_newlines == 0) {
    // Only a line that is too long or has far too many separators does not fit; of those, only
    // separators inside quotes can be right.
    const size_t end = find(text, bytes, '\n');
    if (separators_.quote < 0 || without_return(text, 0, end) > kMaxLineBytes) {
      malformed_.push_back({num_lines_++, origin_, origin_ + without_return(text, 0, end)});
      return at + end + 1;
    }
    ends_.resize(end + 1 + 64);
    scan(text, bytes);
  }

  const bool quoted = separators_.quote >= 0;
  text_ = text;
  if (quoted) {
    arena_.resize(ends_[scan_.num_ends - 1] + 1 + kPadding);
    arena_ends_.resize(scan_.num_ends);
    arena_bytes_ = num_arena_ends_ = 0;
    text_ = arena_.data();
  }
  uint32_t begin = 0;
  uint32_t first = 0;
  for (uint32_t index = 0; index < scan_.num_newlines; ++index) {
    const uint32_t last = newlines_[index];
    const uint32_t newline = ends_[last];
    const uint32_t end = uint32_t(without_return(text, begin, newline));
    ends_[last] = end;
    begins_[index] = begin;
    const uint32_t length = end - begin;
    bool is_row = length <= kMaxLineBytes;
    uint32_t row_first = first;
    uint32_t row_start = begin;
    uint32_t num_fields = last + 1 - first;
    if (quoted && is_row && length != 0) {
      row_first = uint32_t(num_arena_ends_);
      row_start = uint32_t(arena_bytes_);
      if (find(text + begin, length, uint8_t(separators_.quote)) == length) {
        std::memcpy(arena_.data() + arena_bytes_, text + begin, length);
        const uint32_t shift = row_start - begin;
        for (uint32_t i = first; i <= last; ++i) arena_ends_[num_arena_ends_++] = ends_[i] + shift;
        arena_bytes_ += length + 1;
      } else {
        is_row = unquote(text + begin, length);
      }
      num_fields = uint32_t(num_arena_ends_) - row_first;
    }
    if (length != 0) {
      if (is_row && num_fields == num_fields_) {
        first_[num_rows_] = row_first;
        start_[num_rows_] = row_start;
        line_[num_rows_] = index;
        ++num_rows_;
      } else {
        malformed_.push_back(line(index));
      }
    }
    begin = newline + 1;
    first = last + 1;
  }
  num_lines_ += scan_.num_newlines;
  return at + begin;
}

// Appends a line's fields to the arena. False if a quote is not closed or text follows it.
bool Block::unquote(const uint8_t* text, size_t bytes) {
  const uint8_t quote = uint8_t(separators_.quote);
  uint8_t* out = arena_.data() + arena_bytes_;
  size_t at = 0;
  while (true) {
    if (at < bytes && text[at] == quote) {
      ++at;
      while (true) {
        const size_t part = find(text + at, bytes - at, quote);
        if (at + part == bytes) return false;
        std::memcpy(out, text + at, part);
        out += part;
        at += part + 1;
        if (at == bytes || text[at] != quote) break;
        *out++ = quote;
        ++at;
      }
      if (at != bytes && text[at] != separators_.delimiter) return false;
    } else {
      const size_t part = find(text + at, bytes - at, separators_.delimiter);
      std::memcpy(out, text + at, part);
      out += part;
      at += part;
    }
    arena_ends_[num_arena_ends_++] = uint32_t(out - arena_.data());
    ++out;
    if (at == bytes) break;
    ++at;
  }
  arena_bytes_ = size_t(out - arena_.data());
  return true;
}

Rows Block::rows() const {
  const uint32_t* ends = separators_.quote >= 0 ? arena_ends_.data() : ends_.data();
  return {text_, ends, first_.data(), start_.data(), num_rows_};
}

Line Block::line(uint32_t index) const {
  return {first_line_ + index, origin_ + begins_[index], origin_ + ends_[newlines_[index]]};
}

void Block::remove(const std::vector<uint32_t>& rows) {
  size_t next = 0;
  uint32_t kept = 0;
  for (uint32_t row = 0; row < num_rows_; ++row) {
    if (next < rows.size() && rows[next] == row) {
      malformed_.push_back(line(line_[row]));
      ++next;
      continue;
    }
    first_[kept] = first_[row];
    start_[kept] = start_[row];
    line_[kept] = line_[row];
    ++kept;
  }
  num_rows_ = kept;
  std::sort(malformed_.begin(), malformed_.end(),
            [](const Line& a, const Line& b) { return a.number < b.number; });
}

const uint8_t* Block::field(uint32_t row, uint32_t field, uint32_t* bytes) const {
  const Rows all = rows();
  const uint32_t* end = all.ends + all.first[row] + field;
  const uint32_t begin = field == 0 ? all.start[row] : end[-1] + 1;
  *bytes = *end - begin;
  return all.text + begin;
}

}  // namespace dqrm
