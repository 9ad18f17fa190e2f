// Loops over rows in float32.
#include "rows.h"
#include "lookup.h"
#include "update.h"

namespace dqrm {
namespace DQRM_LEVEL {

extern const LookupLoops fp32_lookup_loops = kLookupLoops<Fp32Rows>;
extern const UpdateLoops fp32_update_loops = kUpdateLoops<Fp32Rows>;

}  // namespace DQRM_LEVEL
}  // namespace dqrm
