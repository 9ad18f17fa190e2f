// The key of one step's random bits, as dqrm.kernels.rounding defines it.
#pragma once

#include <cstdint>

namespace dqrm {

inline uint64_t mix64(uint64_t z) {
  z += 0x9E3779B97F4A7C15u;
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
  return z ^ (z >> 31);
}

inline uint64_t step_key(uint64_t seed, uint64_t step) { return mix64(mix64(seed) + step); }

}  // namespace dqrm
