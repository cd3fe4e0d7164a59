// A device slower than the one at hand: when its completions would come.
#pragma once

#include <cstdint>
#include <map>
#include <mutex>

#include "io/plan.h"

namespace kvswap {

// Nanoseconds of the clock that does not jump.
std::int64_t now_ns();
// Sleeps until then, the last bit spinning; false where a signal came first.
bool sleep_until(std::int64_t moment_ns);

// Thread-safe. One clock a device file: requests are served one after another, each taking
// max(1 / iops, nbytes / bytes_per_s).
class Pacer {
 public:
  Pacer(double bytes_per_s, double iops);
  // Returns when the last of the transfers, submitted now, is done.
  std::int64_t charge(const Plan& plan);

 private:
  const double ns_per_byte_, ns_per_request_;
  std::mutex mutex_;
  std::map<int, double> free_ns_;  // by descriptor
};

}  // namespace kvswap
