#include "io/pacer.h"

#include <time.h>

#include <algorithm>

namespace kvswap {
namespace {

constexpr std::int64_t kSecond = 1'000'000'000;
constexpr std::int64_t kSpin = 120'000;  // a sleep may end this much late

}  // namespace

std::int64_t now_ns() {
  timespec now{};
  clock_gettime(CLOCK_MONOTONIC, &now);
  return now.tv_sec * kSecond + now.tv_nsec;
}

bool sleep_until(std::int64_t moment_ns) {
  const std::int64_t left = moment_ns - kSpin - now_ns();
  if (left > 0) {
    timespec pause{static_cast<time_t>(left / kSecond), static_cast<long>(left % kSecond)};
    if (nanosleep(&pause, nullptr)) return false;
  }
  while (now_ns() < moment_ns) {
  }
  return true;
}

Pacer::Pacer(double bytes_per_s, double iops)
    : ns_per_byte_(1e9 / bytes_per_s), ns_per_request_(1e9 / iops) {}

std::int64_t Pacer::charge(const Plan& plan) {
  const auto submitted = static_cast<double>(now_ns());
  std::lock_guard lock(mutex_);
  double last = submitted;
  for (const Transfer& transfer : plan.transfers) {
    double& free = free_ns_[transfer.fd];
    const double cost =
        std::max(ns_per_request_, static_cast<double>(transfer.nbytes) * ns_per_byte_);
    free = std::max(free, submitted) + cost;
    last = std::max(last, free);
  }
  return static_cast<std::int64_t>(last);
}

}  // namespace kvswap
