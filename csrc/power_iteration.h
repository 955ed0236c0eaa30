// What the two rankings share.
#pragma once

#include "simd.h"

namespace atedm {
namespace ATEDM_NAMESPACE {

// scores <- raw / sum(raw). True if the sum of changes is below `tolerance`; never if one of them is NaN.
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
