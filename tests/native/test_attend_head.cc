// Attention of one KV head: every instruction set against the portable kernels.
#include "check.h"
#include "random.h"

using namespace kvswap;
using namespace kvswap::test;

namespace {

struct Part {
  Numbers keys, values;
  int64_t count, key_stride, value_stride;
};

// A job with memory of its own.
struct Job {
  std::vector<Part> parts;
  std::vector<Numbers> query;
  std::vector<int64_t> hidden;
  int64_t head_dim, num_tokens = 0;
  float scaling, softcap;
  Dtype dtype;

  Job(Random& random, Dtype kind, int64_t dim, int64_t rows, bool is_causal, float cap)
      : head_dim(dim), scaling(1 / std::sqrt(static_cast<float>(dim))), softcap(cap), dtype(kind) {
    const auto draw = [&] { return random.normal(); };
    const int64_t num_parts = random.between(1, 6);
    for (int64_t i = 0; i < num_parts; ++i)
      add(random, random.one_of<int64_t>({1, 2, 4, 5, 16, 17}));
    for (int64_t r = 0; r < rows; ++r) {
      query.push_back(numbers(dtype, dim, draw));
      hidden.push_back(is_causal ? random.below(num_tokens) : 0);
    }
  }

  void add(Random& random, int64_t count) {
    const auto draw = [&] { return random.normal(); };
    const int64_t key = head_dim + random.one_of({0, 0, 3}),
                  value = head_dim + random.one_of({0, 0, 5});
    parts.push_back({numbers(dtype, (count - 1) * key + head_dim, draw),
                     numbers(dtype, (count - 1) * value + head_dim, draw), count, key, value});
    num_tokens += count;
  }

  struct Result {
    std::vector<std::vector<float>> out;
    std::vector<float> lse;
  };

  Result run(const Kernels& kernels) const {
    std::vector<Segment> segments;
    for (const Part& p : parts) {
      segments.push_back(
          {p.keys.bytes.data(), p.values.bytes.data(), p.count, p.key_stride, p.value_stride});
    }
    std::vector<const void*> rows;
    for (const Numbers& each : query) rows.push_back(each.bytes.data());
    const auto num_rows = static_cast<int64_t>(rows.size());
    Result made;
    made.out.assign(rows.size(), std::vector<float>(static_cast<size_t>(head_dim)));
    made.lse.resize(rows.size());
    std::vector<float*> out;
    for (std::vector<float>& each : made.out) out.push_back(each.data());
    // What lies in scratch memory must not matter.
    std::vector<float> scratch(static_cast<size_t>(scratch_floats(num_rows, num_tokens, head_dim)),
                               kNan);
    AttendHead a{segments.data(), static_cast<int64_t>(segments.size()),
                 num_tokens,      head_dim,
                 rows.data(),     num_rows,
                 hidden.data(),   scaling,
                 softcap,         dtype,
                 out.data(),      made.lse.data(),
                 scratch.data()};
    kernels.attend_head(a);
    return made;
  }
};

constexpr int64_t kDims[] = {1, 3, 8, 15, 16, 24, 33, 64, 80, 96, 128, 200, 256};

void expect_same(const Job& job, const Kernels& other) {
  const Job::Result expected = job.run(kPortable), found = job.run(other);
  for (size_t r = 0; r < job.query.size(); ++r) {
    CHECK_NEAR(found.lse[r], expected.lse[r], 2e-5 * (1 + std::fabs(expected.lse[r])));
    for (size_t i = 0; i < found.out[r].size(); ++i) {
      CHECK_NEAR(found.out[r][i], expected.out[r][i], 2e-5);
    }
  }
}

}  // namespace

TEST(every_instruction_set_attends_as_the_portable_kernels_do) {
  each_other([](const Kernels& other) {
    const Using named(other.name);
    Random random(2);
    for (const Dtype dtype : {Dtype::f32, Dtype::bf16, Dtype::f16}) {
      for (const int64_t dim : kDims) {
        for (const int64_t rows : {1, 2, 3, 4, 5, 7, 8}) {
          const At at{{"dtype", static_cast<int>(dtype)}, {"head_dim", dim}, {"rows", rows}};
          const float softcap = random.below(3) ? 0.0f : 20.0f;
          expect_same(Job(random, dtype, dim, rows, random.below(2) == 1, softcap), other);
        }
      }
    }
  });
}

TEST(weights_sum_to_one_so_equal_values_come_back) {
  each_name([](const char* name) {
    const Using named(name);
    Random random(3);
    for (const int64_t dim : kDims) {
      const At at{{"head_dim", dim}};
      Job job(random, Dtype::f32, dim, 3, true, 0);
      for (Part& part : job.parts) {
        part.values = numbers(Dtype::f32, static_cast<int64_t>(part.values.plain.size()),
                              [] { return 0.75f; });
      }
      for (const auto& row : job.run(kernels()).out) {
        for (const float x : row) CHECK_NEAR(x, 0.75, 1e-6);
      }
    }
  });
}

TEST(scores_far_apart_neither_overflow_nor_vanish) {
  each_name([](const char* name) {
    const Using named(name);
    Random random(4);
    Job job(random, Dtype::f32, 24, 2, false, 0);
    job.scaling = 3e4f;
    const Job::Result found = job.run(kernels()), expected = job.run(kPortable);
    for (size_t r = 0; r < 2; ++r) {
      CHECK(std::isfinite(found.lse[r]));
      for (size_t i = 0; i < 24; ++i) CHECK_NEAR(found.out[r][i], expected.out[r][i], 1e-3);
    }
  });
}

TEST(a_key_that_is_no_number_leaves_no_number) {
  each_name([](const char* name) {
    const Using named(name);
    for (const Dtype dtype : {Dtype::f32, Dtype::bf16, Dtype::f16}) {
      for (const int64_t dim : {8, 32, 100}) {
        const At at{{"dtype", static_cast<int>(dtype)}, {"head_dim", dim}};
        Random random(5);
        Job job(random, dtype, dim, 3, false, 0);
        const size_t last = job.parts.back().keys.plain.size() - 1;
        const uint32_t bits = dtype == Dtype::f32    ? 0x7fc00000u
                              : dtype == Dtype::bf16 ? 0x7fc0u
                                                     : 0x7e00u;
        std::memcpy(job.parts.back().keys.bytes.data() + last * item_bytes(dtype), &bits,
                    item_bytes(dtype));
        const Job::Result found = job.run(kernels());
        for (size_t r = 0; r < 3; ++r) {
          CHECK(std::isnan(found.lse[r]));
          for (const float x : found.out[r]) CHECK(std::isnan(x));
        }
      }
    }
  });
}
