#pragma once

#include <nanobind/nanobind.h>

namespace dqrm {

void bind_mlp(nanobind::module_& module);
void bind_int8(nanobind::module_& module);
void bind_int8_training(nanobind::module_& module);

}  // namespace dqrm
