// What csrc/io shows to Python.
#pragma once

#include <nanobind/nanobind.h>

namespace kvswap {

void bind_io(nanobind::module_& module);

}  // namespace kvswap
