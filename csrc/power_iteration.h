// Shared by the two rankings.
#pragma once

#include "simd.h"

namespace atedm {
namespace ATEDM_NAMESPACE {

// The scores that a ranking starts from, [batch, heads, tokens]; a null pointer stands for uniform scores.
struct Start {
  const float *values;
  const int64_t *stride;

  const float *of(const atedm_map &map, int64_t pair) const {
    if (values == nullptr) return nullptr;
    return values + pair / map.heads * stride[0] + pair % map.heads * stride[1];
  }
  int64_t token_stride() const { return values == nullptr ? 0 : stride[2]; }
};

// scores <- initial / sum(initial), or 1 / count if `initial` is null.
inline void start_from(const float *initial, int64_t stride, float *scores, int64_t count) {
  double sum = 0;
  for (int64_t i = 0; i < count; ++i) {
    scores[i] = initial == nullptr ? 1.0f : load_as<float>(initial + i * stride);
    sum += scores[i];
  }
  const float total = static_cast<float>(sum);
  for (int64_t i = 0; i < count; ++i) scores[i] /= total;
}

// scores <- raw / sum(raw). Returns whether the sum of changes is below `tolerance`: false if one of them is NaN.
inline bool normalise(float *scores, const float *raw, int64_t count, double tolerance) {
  constexpr int64_t kParts = 16;  // independent sums, in a fixed order, that a compiler can vectorise
  double parts[kParts] = {}, changes[kParts] = {};
  const auto total = [](const double(&values)[kParts]) {
    double sum = 0;
    for (double value : values) sum += value;
    return sum;
  };
  int64_t i = 0;
  for (; i + kParts <= count; i += kParts) {
    for (int64_t p = 0; p < kParts; ++p) parts[p] += raw[i + p];
  }
  for (; i < count; ++i) parts[0] += raw[i];
  const float sum = static_cast<float>(total(parts));
  const auto step = [&](int64_t at, double &change) {
    const float previous = scores[at];
    scores[at] = raw[at] / sum;
    change += __builtin_fabs(static_cast<double>(scores[at]) - previous);
  };
  for (i = 0; i + kParts <= count; i += kParts) {
    for (int64_t p = 0; p < kParts; ++p) step(i + p, changes[p]);
  }
  for (; i < count; ++i) step(i, changes[0]);
  return total(changes) < tolerance;
}

}  // namespace ATEDM_NAMESPACE
}  // namespace atedm
