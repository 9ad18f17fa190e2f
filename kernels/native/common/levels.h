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

}  // namespace dqrm
