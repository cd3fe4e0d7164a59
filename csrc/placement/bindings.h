// What csrc/placement shows to Python.
#pragma once

#include <nanobind/nanobind.h>

namespace kvswap {

void bind_placement(nanobind::module_& module);

}  // namespace kvswap
