// The part of an OpenMP runtime that csrc/common/parallel.cc looks for.
#pragma once

#define KVSWAP_TEST_EXPORT extern "C" __attribute__((visibility("default")))

KVSWAP_TEST_EXPORT int omp_get_thread_num();
KVSWAP_TEST_EXPORT int omp_get_num_threads();
KVSWAP_TEST_EXPORT int omp_get_max_threads();
KVSWAP_TEST_EXPORT int omp_in_parallel();
KVSWAP_TEST_EXPORT void omp_set_num_threads(int count);
KVSWAP_TEST_EXPORT void GOMP_parallel(void (*body)(void*), void* data, unsigned count,
                                      unsigned flags);
