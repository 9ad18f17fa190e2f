// Loops over rows in codes of 4 bits.
#include "code_rows.h"
#include "lookup.h"
#include "update.h"

namespace dqrm {
namespace DQRM_LEVEL {

extern const LookupLoops int4_lookup_loops = kLookupLoops<CodeRows<4>>;
extern const UpdateLoops int4_update_loops = kUpdateLoops<CodeRows<4>>;

}  // namespace DQRM_LEVEL
}  // namespace dqrm
