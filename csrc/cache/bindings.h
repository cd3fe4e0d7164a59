// What csrc/cache shows to Python.
#pragma once

#include <nanobind/nanobind.h>

namespace kvswap {

void bind_cache(nanobind::module_& module);

}  // namespace kvswap
