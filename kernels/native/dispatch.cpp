#include "dispatch.h"

#include <stdexcept>

namespace dqrm {
namespace {

const std::vector<const Loops*>& available() {
  static const std::vector<const Loops*> levels = [] {
    std::vector<const Loops*> found{&kScalarLoops};
#ifdef DQRM_X86
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
        __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2")) {
      found.push_back(&kAvx2Loops);
      if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
        found.push_back(&kAvx512Loops);
      }
    }
#endif
    return found;
  }();
  return levels;
}

}  // namespace

std::vector<std::string> available_levels() {
  std::vector<std::string> names;
  for (const Loops* loops : available()) names.emplace_back(loops->name);
  return names;
}

const Loops& loops_named(const std::string& level) {
  for (const Loops* loops : available()) {
    if (level == loops->name) return *loops;
  }
  throw std::invalid_argument("no such level: " + level);
}

}  // namespace dqrm
