// Loops over rows in codes of 8 bits.
#include "code_rows.h"
#include "lookup.h"
#include "update.h"

namespace dqrm {
namespace DQRM_LEVEL {

extern const LookupLoops int8_lookup_loops = kLookupLoops<CodeRows<8>>;
extern const UpdateLoops int8_update_loops = kUpdateLoops<CodeRows<8>>;

}  // namespace DQRM_LEVEL
}  // namespace dqrm
