// What csrc/kernels shows to Python.
#pragma once

#include <nanobind/nanobind.h>

namespace kvswap {

void bind_kernels(nanobind::module_& module);

}  // namespace kvswap
