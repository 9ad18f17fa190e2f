#pragma once

#include <nanobind/nanobind.h>

namespace dqrm {

void bind_bench(nanobind::module_& module);

}  // namespace dqrm
