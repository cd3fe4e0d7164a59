// Stands in for an OpenMP runtime: threads that the sanitizers understand, and a way to ask
// for more of them than there are cores.
#include "openmp.h"

#include <thread>
#include <vector>

namespace {

int wanted = 1;
thread_local int number = 0;
thread_local int together = 1;

void enter(void (*body)(void*), void* data, int thread, int count) {
  number = thread;
  together = count;
  body(data);
  number = 0;
  together = 1;
}

}  // namespace

int omp_get_thread_num() { return number; }
int omp_get_num_threads() { return together; }
int omp_get_max_threads() { return wanted; }
int omp_in_parallel() { return together > 1; }
void omp_set_num_threads(int count) { wanted = count; }

void GOMP_parallel(void (*body)(void*), void* data, unsigned count, unsigned) {
  std::vector<std::thread> others;
  for (unsigned thread = 1; thread < count; ++thread) {
    others.emplace_back(enter, body, data, static_cast<int>(thread), static_cast<int>(count));
  }
  enter(body, data, 0, static_cast<int>(count));
  for (std::thread& other : others) other.join();
}
