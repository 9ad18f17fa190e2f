// The values of large magnitude among many: most vectors hold none and are passed over.
#include "../common/simd.h"
#include "loops.h"

namespace dqrm {
namespace DQRM_LEVEL {
namespace {

constexpr uint32_t kInfinity = 0x7F800000u;

inline uint32_t magnitude_of(float value) {
  uint32_t word;
  __builtin_memcpy(&word, &value, sizeof word);
  return word & 0x7FFFFFFFu;
}

// As patterns of bits magnitudes are ordered like integers, infinity and NaN above all others.
Selected select(const float* values, int64_t count, float threshold, int64_t room,
                int64_t* indices) {
  const uint32_t least = magnitude_of(threshold);
  const I32 leasts = I32{} + int32_t(least);
  Selected found{0, -1};
  for (int64_t i = 0; i < count; i += kLanes) {
    const int64_t end = i + kLanes < count ? i + kLanes : count;
    if (end - i == kLanes) {
      const I32 magnitudes = I32(load(values + i)) & 0x7FFFFFFF;
      if (!any(magnitudes >= leasts)) continue;
    }
    for (int64_t k = i; k < end; ++k) {
      const uint32_t magnitude = magnitude_of(values[k]);
      if (magnitude < least) continue;
      if (magnitude >= kInfinity) return {found.count, k};
      if (found.count < room) indices[found.count] = k;
      ++found.count;
    }
  }
  return found;
}

}  // namespace

extern const SelectLoops select_loops{&select};

}  // namespace DQRM_LEVEL
}  // namespace dqrm
