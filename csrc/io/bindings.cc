#include "io/bindings.h"

namespace kvswap {

void bind_io(nanobind::module_& module) { (void)module; }

}  // namespace kvswap
