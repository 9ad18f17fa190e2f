#pragma once

#include <nanobind/nanobind.h>

namespace dqrm {

void bind_interaction(nanobind::module_& module);

}  // namespace dqrm
