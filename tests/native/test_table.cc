// Which kernels there are, and which of them run.
#include <set>
#include <string>

#include "check.h"
#include "random.h"

using namespace kvswap;
using namespace kvswap::test;

TEST(the_portable_kernels_are_there_and_come_last) {
  const Kernels* last = nullptr;
  std::set<std::string> names;
  for (const Kernels* const* each = all_kernels(); *each; ++each) {
    last = *each;
    CHECK(names.insert(last->name).second);
  }
  CHECK(last == &kPortable);
  CHECK(last->is_there());
}

TEST(the_best_that_run_here_are_in_use) {
  const Kernels* const* each = all_kernels();
  while (!(*each)->is_there()) ++each;
  CHECK(&kernels() == *each);
}

TEST(a_name_forces_its_kernels) {
  each_name([](const char* name) {
    const Using forced(name);
    CHECK(std::string(kernels().name) == name);
  });
}

TEST(an_unknown_name_changes_nothing) {
  const std::string before = kernels().name;
  CHECK(!use_kernels("sse9"));
  CHECK(!use_kernels(""));
  CHECK(kernels().name == before);
}

TEST(all_kernels_are_filled_in) {
  for (const Kernels* const* each = all_kernels(); *each; ++each) {
    CHECK((*each)->attend_head && (*each)->score_tile && (*each)->project);
    CHECK((*each)->column_sums && (*each)->best_shifted && (*each)->widen);
    CHECK((*each)->count_from);
  }
}
