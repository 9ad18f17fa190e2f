// The instruction sets the loops are compiled for, and which of them this processor has.
//
// Loops live in files named *_loops.cpp. Each is compiled once for every level, into the namespace
// dqrm::DQRM_LEVEL, with that level's compiler flags; it defines one constant table of function
// pointers. The headers those files include may hold only types without methods and templates or
// functions of internal linkage: an inline function shared with the rest of the library could end
// up in the binary in the version of the newest processor.
#pragma once

namespace dqrm {

enum class Level : int { scalar, avx2, avx512 };

}  // namespace dqrm

// Declares the table `name` of type `type` at every level.
#ifdef DQRM_X86
#define DQRM_DECLARE_LOOPS(type, name) \
  namespace scalar {                   \
  extern const type name;              \
  }                                    \
  namespace avx2 {                     \
  extern const type name;              \
  }                                    \
  namespace avx512 {                   \
  extern const type name;              \
  }
// The table `name` of a level.
#define DQRM_LOOPS_AT(level, name)                                  \
  ((level) == ::dqrm::Level::avx512 ? ::dqrm::avx512::name          \
   : (level) == ::dqrm::Level::avx2 ? ::dqrm::avx2::name            \
                                    : ::dqrm::scalar::name)
#else
#define DQRM_DECLARE_LOOPS(type, name) \
  namespace scalar {                   \
  extern const type name;              \
  }
#define DQRM_LOOPS_AT(level, name) (static_cast<void>(level), ::dqrm::scalar::name)
#endif
