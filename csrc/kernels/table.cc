#include <atomic>
#include <cstring>

#include "kernels/api.h"

namespace kvswap {
namespace {

const Kernels* const kAll[] = {
#if defined(__x86_64__)
    &kAvx512Bf16, &kAvx512, &kAvx2,
#elif defined(__aarch64__)
    &kNeon,
#endif
    &kPortable,   nullptr,
};

const Kernels* best() {
  for (const Kernels* const* each = kAll; *each; ++each) {
    if ((*each)->is_there()) return *each;
  }
  return &kPortable;
}

std::atomic<const Kernels*>& chosen() {
  static std::atomic<const Kernels*> value{best()};
  return value;
}

}  // namespace

const Kernels* const* all_kernels() { return kAll; }

const Kernels& kernels() { return *chosen().load(std::memory_order_relaxed); }

bool use_kernels(const char* name) {
  for (const Kernels* const* each = kAll; *each; ++each) {
    if (std::strcmp((*each)->name, name) == 0 && (*each)->is_there()) {
      chosen().store(*each, std::memory_order_relaxed);
      return true;
    }
  }
  return false;
}

}  // namespace kvswap
