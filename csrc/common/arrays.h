// Arrays as functions that Python calls take them: plain memory of one or two dimensions.
#pragma once

#include <nanobind/ndarray.h>

namespace kvswap {

template <class T>
using Array = nanobind::ndarray<T, nanobind::ndim<1>, nanobind::c_contig, nanobind::device::cpu>;
template <class T>
using Matrix = nanobind::ndarray<T, nanobind::ndim<2>, nanobind::c_contig, nanobind::device::cpu>;

}  // namespace kvswap
