// Runs the tests of all files, or of those that the arguments name. A law that the machine
// at hand cannot be held to is named, and is no failure.
#include <cmath>
#include <cstdio>
#include <cstring>

#include "check.h"
#include "kernels/api.h"

namespace kvswap::test {
namespace {

std::vector<std::pair<const char*, int64_t>>& places() {
  static std::vector<std::pair<const char*, int64_t>> all;
  return all;
}

const char* base_name(const char* path) {
  const char* slash = std::strrchr(path, '/');
  return slash ? slash + 1 : path;
}

bool is_named(const Case& each, int count, char** names) {
  for (int i = 1; i < count; ++i) {
    if (std::strcmp(base_name(each.file), names[i]) == 0) return true;
  }
  return count == 1;
}

bool passes(const Case& each) {
  try {
    each.run();
  } catch (const Skip& skip) {
    std::printf("skipped %s: %s\n", each.name, skip.why.c_str());
  } catch (const Failure& failure) {
    std::printf("FAILED %s\n  %s\n", each.name, failure.what.c_str());
    return false;
  }
  return true;
}

}  // namespace

std::vector<Case>& cases() {
  static std::vector<Case> all;
  return all;
}

At::At(std::initializer_list<std::pair<const char*, int64_t>> values) : before_(places().size()) {
  places().insert(places().end(), values);
}

At::~At() { places().resize(before_); }

void fail(const char* file, int line, const std::string& what) {
  std::string text = std::string(base_name(file)) + ":" + std::to_string(line) + ": " + what;
  text += std::string(" [") + kernels().name + "]";
  for (const auto& [name, value] : places()) {
    text += std::string(" ") + name + "=" + std::to_string(value);
  }
  throw Failure{text};
}

void expect_near(const char* file, int line, double found, double expected, double tolerance) {
  const bool is_same = found == expected || (std::isnan(found) && std::isnan(expected));
  if (is_same || std::fabs(found - expected) <= tolerance) return;
  fail(file, line,
       std::to_string(found) + " should be " + std::to_string(expected) + " within " +
           std::to_string(tolerance));
}

Using::Using(const char* name) : before_(kernels().name) {
  if (!use_kernels(name)) fail(__FILE__, __LINE__, std::string("no kernels ") + name);
  if (std::strcmp(kernels().name, name) != 0) fail(__FILE__, __LINE__, "others were chosen");
}

Using::~Using() { use_kernels(before_.c_str()); }

}  // namespace kvswap::test

int main(int count, char** names) {
  int run = 0, failed = 0;
  for (const auto& each : kvswap::test::cases()) {
    if (!kvswap::test::is_named(each, count, names)) continue;
    ++run;
    if (!kvswap::test::passes(each)) ++failed;
  }
  std::printf("%d tests, %d failed\n", run, failed);
  return failed || !run ? 1 : 0;
}
