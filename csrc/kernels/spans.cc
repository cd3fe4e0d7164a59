#include "kernels/spans.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "common/parallel.h"
#include "kernels/half.h"

namespace kvswap {
namespace {

constexpr int64_t kLeastSpans = 16;  // a thread's worth
constexpr float kScaleLimit = 6.0e4f;

// Where byte i of a token or a span lies.
int64_t place(int64_t at, int64_t i, int64_t width) {
  return at / kTileTokens * width * kTileTokens + i / 4 * 4 * kTileTokens + at % kTileTokens * 4 +
         i % 4;
}

// What a token's codes stand for, at the places that a query's coefficients have.
void decode(const CodedKeys& keys, int64_t token, std::vector<float>& x) {
  const auto byte = [&](int64_t i) { return keys.codes[place(token, i, keys.width)]; };
  if (keys.code == Code::bf16) {
    for (int64_t j = 0; j < keys.rank; ++j) {
      x[static_cast<size_t>(j)] =
          from_bf16(static_cast<uint16_t>(byte(2 * j) | byte(2 * j + 1) << 8));
    }
    return;
  }
  const float scale = from_f16(keys.scales[token]);
  if (keys.code == Code::int8) {
    for (int64_t j = 0; j < keys.rank; ++j) {
      x[static_cast<size_t>(j)] = static_cast<float>(byte(j) - 128) * scale;
    }
    return;
  }
  const int64_t length = plane_length(keys.code, keys.rank);
  const int top = grid_top(keys.code), bits = grid_bits(keys.code);
  const float middle = static_cast<float>(top) / 2;
  for (int64_t j = 0; j < keys.rank; ++j) {
    const int64_t plane = j / length, i = j % length;
    const auto code = static_cast<float>((byte(i) >> (bits * plane)) & top);
    x[static_cast<size_t>(plane * keys.width + i)] = (code - middle) * scale;
  }
}

// Codes a centre and leaves in `centre` what its codes stand for.
void encode(const CodedKeys& keys, const Spans& spans, int64_t span, std::vector<float>& centre) {
  const int64_t width = span_width(keys);
  const auto byte = [&](int64_t i) -> uint8_t& { return spans.codes[place(span, i, width)]; };
  if (keys.code == Code::bf16) {
    for (int64_t j = 0; j < keys.rank; ++j) {
      float& x = centre[static_cast<size_t>(j)];
      const uint16_t half = to_bf16(x);
      byte(2 * j) = static_cast<uint8_t>(half & 255);
      byte(2 * j + 1) = static_cast<uint8_t>(half >> 8);
      x = from_bf16(half);
    }
    return;
  }
  float top = 0;
  for (const float x : centre) top = std::max(top, std::fabs(x));
  spans.scales[span] = to_f16(std::min(top / 127, kScaleLimit));
  const float scale = from_f16(spans.scales[span]);
  for (int64_t j = 0; j < width; ++j) {
    float& x = centre[static_cast<size_t>(j)];
    const float code = scale > 0 ? std::clamp(std::nearbyint(x / scale), -127.0f, 127.0f) : 0.0f;
    byte(j) = static_cast<uint8_t>(code + 128);
    x = code * scale;
  }
}

double length(const std::vector<float>& x) {
  double squares = 0;
  for (const float each : x) squares += static_cast<double>(each) * each;
  return std::sqrt(squares);
}

class Bounder {
 public:
  Bounder(const CodedKeys& keys, const Spans& spans)
      : keys_(keys),
        spans_(spans),
        in_span_(std::max<int64_t>(kTileTokens, keys.group_size)),
        tokens_(static_cast<size_t>(in_span_)) {
    const int64_t item = keys.code == Code::bf16 ? 2 : 1;
    centre_.resize(static_cast<size_t>(span_width(keys) / item));
    for (auto& token : tokens_) token.resize(centre_.size());
  }

  void bound(int64_t span) {
    std::fill(centre_.begin(), centre_.end(), 0.0f);
    double longest = 0, coarsest = 0;
    for (int64_t t = 0; t < in_span_; ++t) {
      std::vector<float>& token = tokens_[static_cast<size_t>(t)];
      decode(keys_, span * in_span_ + t, token);
      for (size_t j = 0; j < token.size(); ++j) {
        centre_[j] += token[j] / static_cast<float>(in_span_);
      }
      longest = std::max(longest, length(token));
      if (grid_bits(keys_.code)) {
        const double scale = from_f16(keys_.scales[span * in_span_ + t]);
        coarsest = std::max(coarsest, scale);
      }
    }
    encode(keys_, spans_, span, centre_);
    double radius = 0;
    for (std::vector<float>& token : tokens_) {
      for (size_t j = 0; j < token.size(); ++j) token[j] -= centre_[j];
      radius = std::max(radius, length(token));
    }
    // Beside the distance: what single precision may add to a product, and half a unit of
    // query and key, by which the offset of a grid is made whole; a query's largest
    // coefficient has 127 units.
    const double rounding = std::ldexp(static_cast<double>(keys_.rank + 16), -22);
    radius += rounding * (longest + length(centre_) + radius) + coarsest / 250;
    spans_.radii[span] = static_cast<float>(radius);
  }

 private:
  const CodedKeys& keys_;
  const Spans& spans_;
  int64_t in_span_;
  std::vector<float> centre_;
  std::vector<std::vector<float>> tokens_;
};

}  // namespace

int64_t span_width(const CodedKeys& keys) { return planes_of(keys.code) * keys.width; }

void bound_spans(const CodedKeys& keys, const Spans& spans, const int64_t* ids, int64_t count) {
  const int64_t in_span = std::max<int64_t>(1, kTileTokens / keys.group_size);
  std::vector<int64_t> touched(ids, ids + count);
  for (int64_t& id : touched) id /= in_span;
  std::sort(touched.begin(), touched.end());
  touched.erase(std::unique(touched.begin(), touched.end()), touched.end());
  const auto total = static_cast<int64_t>(touched.size());
  const int64_t worth = std::max<int64_t>(1, total / kLeastSpans);
  parallel(static_cast<int>(std::min<int64_t>(num_threads(), worth)), [&](int thread, int all) {
    Bounder bounder(keys, spans);
    for (int64_t i = total * thread / all; i < total * (thread + 1) / all; ++i) {
      bounder.bound(touched[static_cast<size_t>(i)]);
    }
  });
}

}  // namespace kvswap
