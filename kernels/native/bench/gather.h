// Reading random rows, and nothing else: what memory allows any look-up.
#pragma once

#include <cstdint>

#include "../common/level.h"

namespace dqrm {

struct GatherLoops {
  // Whether all row numbers are in [0, height).
  bool (*inside)(const int64_t* rows, int64_t count, int64_t height);

  // Reads rows[begin, end) of a table of row_bytes a row and writes out_bytes for each to out,
  // which begins at that of row 0. Rows are asked for `ahead` rows before they are read; 0 leaves
  // that to the processor. The caller has checked the row numbers.
  void (*gather)(const uint8_t* table, const int64_t* rows, int64_t begin, int64_t end,
                 int64_t row_bytes, int64_t out_bytes, int64_t ahead, uint8_t* out);
};

DQRM_DECLARE_LOOPS(GatherLoops, gather_loops)

}  // namespace dqrm
