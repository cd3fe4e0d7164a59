// The Python module kvswap._native.
#include "cache/bindings.h"

#include <nanobind/nanobind.h>

#include "io/bindings.h"
#include "kernels/bindings.h"
#include "placement/bindings.h"

NB_MODULE(_native, module) {
  module.doc() =
      "Kernels and I/O engine of kvswap; reached through kvswap.kernels and kvswap.storage.";
  kvswap::bind_cache(module);
  kvswap::bind_kernels(module);
  kvswap::bind_io(module);
  kvswap::bind_placement(module);
}
