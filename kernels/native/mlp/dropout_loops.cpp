#include "dropout_loops.h"

#include "../common/rounding.h"

namespace dqrm {
namespace DQRM_LEVEL {
namespace {

void drop(float* values, int64_t count, uint64_t key, int64_t row, uint32_t dropped,
          float factor) {
  const uint32_t bits_key = row_key(key, row);
  const I32 below = I32{} + int32_t(dropped);
  const F32 zero{}, kept = all(factor);
  for (int64_t begin = 0; begin < count; begin += kLanes) {
    const I32 bits = I32(random_lanes(bits_key, uint32_t(begin)) >> 8);
    const F32 by = bits < below ? zero : kept;
    if (const int64_t rest = count - begin; rest < kLanes) {
      store_part(values + begin, load_part(values + begin, int(rest)) * by, int(rest));
    } else {
      store(values + begin, load(values + begin) * by);
    }
  }
}

}  // namespace

const DropoutLoops dropout_loops = {drop};

}  // namespace DQRM_LEVEL
}  // namespace dqrm
