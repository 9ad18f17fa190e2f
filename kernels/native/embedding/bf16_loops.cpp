// Loops over rows in bfloat16.
#include "bfloat_rows.h"
#include "lookup.h"
#include "update.h"

namespace dqrm {
namespace DQRM_LEVEL {

extern const LookupLoops bf16_lookup_loops = kLookupLoops<BFloatRows>;
extern const UpdateLoops bf16_update_loops = kUpdateLoops<BFloatRows>;

}  // namespace DQRM_LEVEL
}  // namespace dqrm
