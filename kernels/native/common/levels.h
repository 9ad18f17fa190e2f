// Names of the levels and which of them this processor can run.
#pragma once

#include <string>
#include <vector>

#include "level.h"

namespace dqrm {

// Names of the levels this build and this processor have, slowest first.
std::vector<std::string> available_levels();

// Throws std::invalid_argument for a level that available_levels does not name.
Level level_named(const std::string& name);

// Instruction sets beyond the levels that single kernels ask for.
bool has_avx512_bf16();
bool has_avx512_vnni();
bool has_amx();

// Whether AVX512-BF16 is there and multiplies faster than FP32. Intel's processors start one of its
// instructions every other cycle and two FP32 ones every cycle: half as many products.
bool has_fast_avx512_bf16();

}  // namespace dqrm
