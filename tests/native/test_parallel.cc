// Work shared over the threads of the runtime that the process has loaded.
#include <set>
#include <thread>

#include "check.h"
#include "common/parallel.h"
#include "openmp.h"
#include "random.h"

using namespace kvswap;
using namespace kvswap::test;

TEST(every_thread_of_a_call_is_called_once) {
  for (int count = 1; count <= 5; ++count) {
    const At at{{"count", count}};
    std::vector<int> calls(static_cast<size_t>(count));
    parallel(count,
             [&](int thread, int total) { calls[static_cast<size_t>(thread)] += total == count; });
    CHECK(calls == std::vector<int>(static_cast<size_t>(count), 1));
  }
}

TEST(the_threads_are_those_of_the_loaded_runtime) {
  omp_set_num_threads(3);
  CHECK(num_threads() == 3);
  std::vector<std::thread::id> ids(3);
  parallel(3,
           [&](int thread, int) { ids[static_cast<size_t>(thread)] = std::this_thread::get_id(); });
  omp_set_num_threads(1);
  CHECK(std::set<std::thread::id>(ids.begin(), ids.end()).size() == 3);
  CHECK(num_threads() == 1);
}

TEST(within_a_parallel_call_there_is_one_thread) {
  omp_set_num_threads(2);
  std::vector<int> found(2);
  parallel(2, [&](int thread, int) { found[static_cast<size_t>(thread)] = num_threads(); });
  omp_set_num_threads(1);
  CHECK((found == std::vector<int>{1, 1}));
}
