// A block of lines cut into rows of fields.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "loops.h"

namespace dqrm {

// As MAX_LINE_BYTES in dqrm/kernels/plan.py.
constexpr size_t kMaxLineBytes = size_t{1} << 24;

struct Separators {
  uint8_t delimiter;
  int quote;  // -1: none
};

// A line of the buffer, counted from the buffer's start.
struct Line {
  uint64_t number;
  uint64_t begin;
  uint64_t end;  // of its text, without the line break
};

// Reads lines from a text and keeps those that have the right number of fields as rows.
class Block {
 public:
  Block(const Loops& loops, Separators separators, uint32_t num_fields, uint32_t max_rows);

  // Takes the next lines of text[at, bytes), which ends in a newline and has kPadding readable
  // bytes after that. Returns where the next block begins. `origin` is text's place in the buffer.
  size_t read(const uint8_t* text, size_t at, size_t bytes, uint64_t origin);

  // The rows of the block; valid until the next read or remove.
  Rows rows() const;
  // Takes rows out and notes their lines as malformed. `rows` ascends.
  void remove(const std::vector<uint32_t>& rows);
  // Lines of this block that are neither rows nor blank.
  std::vector<Line>& malformed() { return malformed_; }
  // Lines of all blocks so far.
  uint64_t num_lines() const { return num_lines_; }

  const uint8_t* field(uint32_t row, uint32_t field, uint32_t* bytes) const;

 private:
  void scan(const uint8_t* text, size_t bytes);
  bool unquote(const uint8_t* text, size_t bytes);
  Line line(uint32_t index) const;

  const Loops& loops_;
  const Separators separators_;
  const uint32_t num_fields_;
  // Of the source text.
  Scan scan_{};
  std::vector<uint32_t> ends_;
  std::vector<uint32_t> newlines_;
  std::vector<uint32_t> begins_;  // of each line
  uint64_t origin_ = 0;
  // With quotes rows lie in a copy without them.
  std::vector<uint8_t> arena_;
  std::vector<uint32_t> arena_ends_;
  size_t arena_bytes_ = 0;
  size_t num_arena_ends_ = 0;

  const uint8_t* text_ = nullptr;
  uint32_t num_rows_ = 0;
  std::vector<uint32_t> first_;
  std::vector<uint32_t> start_;
  std::vector<uint32_t> line_;  // of each row, its line within the block
  std::vector<Line> malformed_;
  uint64_t num_lines_ = 0;
  uint64_t first_line_ = 0;
};

}  // namespace dqrm
