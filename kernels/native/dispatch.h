// Which loops this processor can run.
#pragma once

#include <string>
#include <vector>

#include "loops.h"

namespace dqrm {

// Names of the levels, slowest first.
std::vector<std::string> available_levels();

// Throws std::invalid_argument for a level that available_levels does not name.
const Loops& loops_named(const std::string& level);

}  // namespace dqrm
