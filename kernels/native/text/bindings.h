#pragma once

#include <nanobind/nanobind.h>

namespace dqrm {

void bind_text(nanobind::module_& module);

}  // namespace dqrm
