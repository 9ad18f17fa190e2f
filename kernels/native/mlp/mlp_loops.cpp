// Linear layers in FP32.
#include <utility>

#include "../common/simd.h"
#include "loops.h"

namespace dqrm {
namespace DQRM_LEVEL {
namespace {

constexpr int kUnit = 1;
// Two vectors of sums a row: 24 or 12 registers, which leaves enough for the operands.
constexpr int kRows = kLanes == 16 ? 12 : 6;

inline F32 multiply_add(U32 a, U32 b, F32 sum) { return fma(F32(a), F32(b), sum); }

inline void store_units(uint32_t* to, F32 low, F32 high) {
  __builtin_memcpy(to, &low, sizeof low);
  __builtin_memcpy(to + kLanes, &high, sizeof high);
}

inline void load_units(const uint32_t* from, F32* low, F32* high) {
  __builtin_memcpy(low, from, sizeof *low);
  __builtin_memcpy(high, from + kLanes, sizeof *high);
}

// Units along the rows are the units along the columns: one value.
inline U32 pair_rows(F32 even, F32) { return U32(even); }

inline U32 transposable(F32 low, F32) { return U32(low); }

}  // namespace
}  // namespace DQRM_LEVEL
}  // namespace dqrm

#include "loops.inl"
