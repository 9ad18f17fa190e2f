// Numbers and points in time as text. dqrm/kernels/rows.py defines the same in Python.
#pragma once

#include <cstddef>
#include <cstdint>

namespace dqrm {

enum class Parsed { kValue, kMissing, kMalformed };

// A finite double. Empty, blank and nan are missing; infinite, beyond double and anything that is
// not a decimal number is malformed. Minus zero becomes zero.
Parsed parse_number(const uint8_t* text, size_t bytes, double* value);

// 0 or 1, also written 0.0 or 1.0; anything else is malformed.
Parsed parse_label(const uint8_t* text, size_t bytes, float* value);

// A number as it stands, or YYYY-MM-DD with an optional [ T]HH:MM:SS[.f][Z or offset] as seconds
// since 1970 UTC. Missing is malformed.
Parsed parse_time(const uint8_t* text, size_t bytes, double* value);

}  // namespace dqrm
