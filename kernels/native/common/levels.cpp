#include "levels.h"

#include <array>
#include <stdexcept>
#include <utility>

#ifdef DQRM_X86
#include <cpuid.h>
#endif

namespace dqrm {
namespace {

constexpr std::array<std::pair<const char*, Level>, 3> kNames{{
    {"scalar", Level::scalar},
    {"avx2", Level::avx2},
    {"avx512", Level::avx512},
}};

bool can_run(Level level) {
  if (level == Level::scalar) return true;
#ifdef DQRM_X86
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2");
  if (level == Level::avx2) return avx2;
  return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#else
  return false;
#endif
}

}  // namespace

std::vector<std::string> available_levels() {
  std::vector<std::string> names;
  for (const auto& [name, level] : kNames) {
    if (can_run(level)) names.emplace_back(name);
  }
  return names;
}

Level level_named(const std::string& wanted) {
  for (const auto& [name, level] : kNames) {
    if (wanted == name && can_run(level)) return level;
  }
  throw std::invalid_argument("no such level: " + wanted);
}

bool has_avx512_bf16() {
#ifdef DQRM_X86
  return can_run(Level::avx512) && __builtin_cpu_supports("avx512bf16");
#else
  return false;
#endif
}

bool has_fast_avx512_bf16() {
#ifdef DQRM_X86
  return has_avx512_bf16() && !__builtin_cpu_is("intel");
#else
  return false;
#endif
}

bool has_avx512_vnni() {
#ifdef DQRM_X86
  return can_run(Level::avx512) && __builtin_cpu_supports("avx512vnni");
#else
  return false;
#endif
}

bool has_amx() {
#ifdef DQRM_X86
  // Leaf 7: bits 22 and 24 of edx are AMX-BF16 and AMX-TILE.
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) return false;
  return (edx >> 22 & 1) != 0 && (edx >> 24 & 1) != 0;
#else
  return false;
#endif
}

}  // namespace dqrm
