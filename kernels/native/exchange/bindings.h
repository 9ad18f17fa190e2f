#pragma once

#include <nanobind/nanobind.h>

namespace dqrm {

void bind_exchange(nanobind::module_& module);

}  // namespace dqrm
