#pragma once

#include <nanobind/nanobind.h>

namespace dqrm {

void bind_packed(nanobind::module_& module);

}  // namespace dqrm
