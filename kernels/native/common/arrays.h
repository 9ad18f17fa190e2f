// How tensors come in from Python: as DLPack capsules, read and written in place.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <cstdint>

namespace dqrm {

template <typename T, int Dims = 1>
using Array = nanobind::ndarray<T, nanobind::ndim<Dims>, nanobind::c_contig, nanobind::device::cpu>;

}  // namespace dqrm
