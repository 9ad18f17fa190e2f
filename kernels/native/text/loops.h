// The loops that exist once for each instruction set, as a table of plain functions.
//
// Only types without methods here: this header is included by files compiled for newer processors,
// and an inline function they share with the rest could end up in the binary in their version.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../common/level.h"

namespace dqrm {

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__,
              "bytes are read as little-endian words; build with -C wheel.cmake=false here");

// Bytes that must be readable after the end of any text given to these loops.
constexpr size_t kPadding = 64;

// Where fields end. Both arrays belong to the caller.
struct Scan {
  uint32_t* ends;      // offset of every delimiter and newline, in order
  uint32_t max_ends;
  uint32_t* newlines;  // for every newline, its position in `ends`
  uint32_t max_newlines;
  uint32_t num_ends;
  uint32_t num_newlines;
};

// Rows of one block of text, as the column loops want them.
struct Rows {
  const uint8_t* text;
  const uint32_t* ends;   // as in Scan
  const uint32_t* first;  // [count] position in `ends` of each row's first field
  const uint32_t* start;  // [count] offset of each row's first byte
  uint32_t count;
};

struct Loops {
  // Finds delimiters and newlines from the start of text until max_newlines, until fewer than 64
  // places are left in `ends`, or until its end.
  void (*scan)(const uint8_t* text, size_t bytes, uint8_t delimiter, Scan* scan);

  // For one field of all rows: its first 8 bytes (more than it has, if it is shorter), its length.
  void (*extract)(const Rows* rows, uint32_t field, uint64_t* lanes, uint32_t* lengths);

  // XXH64 of fields of 8 bytes and of none. Returns how many had another length; their keys are
  // not set and their rows stand in `others`.
  uint32_t (*hash)(const uint64_t* lanes, const uint32_t* lengths, uint32_t count, uint64_t* keys,
                   uint32_t* others);

  // Values of fields of 0 to 8 decimal digits (none is 0). Returns how many were something else;
  // their values are 0 and their rows stand in `others`.
  uint32_t (*digits)(const uint64_t* lanes, const uint32_t* lengths, uint32_t count,
                     uint32_t* values, uint32_t* others);

  // table[value], or NaN where the table is too short.
  void (*look_up)(const uint32_t* values, uint32_t count, const float* table, uint32_t table_size,
                  float* out);

  // Values below 2^31 as floats, rounded to nearest.
  void (*to_float)(const uint32_t* values, uint32_t count, float* out);

  // High 64 bits of key * buckets.
  void (*bucket)(const uint64_t* keys, size_t count, uint32_t buckets, int32_t* out);

  // How many lengths are 0.
  uint32_t (*count_empty)(const uint32_t* lengths, uint32_t count);
};

DQRM_DECLARE_LOOPS(Loops, text_loops)

}  // namespace dqrm
