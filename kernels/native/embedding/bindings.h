#pragma once

#include <nanobind/nanobind.h>

namespace dqrm {

void bind_embedding(nanobind::module_& module);

}  // namespace dqrm
