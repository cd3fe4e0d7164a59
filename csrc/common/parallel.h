// Work shared over the threads of the OpenMP runtime that the process has loaded.
//
// Two pools on few cores slow each other down: a runtime's idle threads spin for
// milliseconds where another pool's threads wait for a core. So the kernels have no pool of
// their own; they enter the one that torch uses, and where none is loaded they run alone.
#pragma once

#include <type_traits>

namespace kvswap {

// Threads that `parallel` would use: what torch.set_num_threads asked for, 1 without a runtime.
int num_threads();

namespace detail {
using Body = void (*)(void* data, int thread, int count);
void run_parallel(int count, Body body, void* data);
}  // namespace detail

// Calls body(thread, count) once for each thread in [0, count); count may turn out smaller
// than asked for. Nothing may throw out of it.
template <class F>
void parallel(int count, F&& body) {
  using Plain = std::remove_reference_t<F>;
  if (count <= 1) {
    body(0, 1);
    return;
  }
  detail::run_parallel(
      count, [](void* data, int thread, int total) { (*static_cast<Plain*>(data))(thread, total); },
      const_cast<void*>(static_cast<const void*>(&body)));
}

}  // namespace kvswap
