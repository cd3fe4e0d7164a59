// A test is a function that states a law, and fails by throwing.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <string>
#include <utility>
#include <vector>

namespace kvswap::test {

struct Failure {
  std::string what;
};
struct Skip {
  std::string why;
};

struct Case {
  const char* file;
  const char* name;
  void (*run)();
};

std::vector<Case>& cases();

struct Register {
  Register(const char* file, const char* name, void (*run)()) {
    cases().push_back({file, name, run});
  }
};

// What the loops around a check are at, for the message of one that fails. Main thread only.
class At {
 public:
  At(std::initializer_list<std::pair<const char*, int64_t>> values);
  ~At();
  At(const At&) = delete;

 private:
  std::size_t before_;
};

[[noreturn]] void fail(const char* file, int line, const std::string& what);
void expect_near(const char* file, int line, double found, double expected, double tolerance);

// Forces kernels by name until it goes; those are the ones that run.
class Using {
 public:
  explicit Using(const char* name);
  ~Using();
  Using(const Using&) = delete;

 private:
  std::string before_;
};

}  // namespace kvswap::test

#define TEST(name)                                                              \
  static void name();                                                           \
  static const ::kvswap::test::Register register_##name(__FILE__, #name, name); \
  static void name()

#define CHECK(condition)                                                    \
  do {                                                                      \
    if (!(condition)) ::kvswap::test::fail(__FILE__, __LINE__, #condition); \
  } while (false)

#define CHECK_NEAR(found, expected, tolerance) \
  ::kvswap::test::expect_near(__FILE__, __LINE__, found, expected, tolerance)
