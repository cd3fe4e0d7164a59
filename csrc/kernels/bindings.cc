#include "kernels/bindings.h"

namespace kvswap {

void bind_kernels(nanobind::module_& module) { (void)module; }

}  // namespace kvswap
