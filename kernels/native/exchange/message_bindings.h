#pragma once

#include <nanobind/nanobind.h>

namespace dqrm {

void bind_row_messages(nanobind::module_& module);

}  // namespace dqrm
