// The `keep` best tokens of each row, ascending, by radix selection: nothing is sorted, so the order is that of the
// tokens and ties go to the lower index. Heads are joined in double precision, as the reference does.
#include <cmath>
#include <cstring>
#include <limits>

#include "atedm.h"
#include "parallel.h"

namespace {

struct Selection {
  const float *scores;
  const int64_t *stride;
  int64_t heads, tokens, keep;
  bool rms;
  int64_t *out;
  uint64_t *importance;  // scratch, [threads, tokens]

  double score(int64_t b, int64_t h, int64_t n) const {
    float value;
    std::memcpy(&value, scores + b * stride[0] + h * stride[1] + n * stride[2], sizeof(value));
    return value;
  }

  double join_heads(int64_t b, int64_t n) const {
    double largest = 0, total = 0;
    bool is_nan = false;
    for (int64_t h = 0; h < heads; ++h) {
      const double value = score(b, h, n);
      is_nan |= std::isnan(value);
      largest = std::fabs(value) > largest ? std::fabs(value) : largest;
      total += rms ? value * value : value;
    }
    if (is_nan) return std::numeric_limits<double>::quiet_NaN();
    // A double holds the square of every float32, from the smallest to the largest, so nothing has to be scaled.
    if (rms) return std::isinf(largest) ? largest : std::sqrt(total / static_cast<double>(heads));
    return total / static_cast<double>(heads);
  }

  // The same order as unsigned integers: NaN lowest, -0.0 equal to 0.0.
  static uint64_t ordered(double x) {
    if (std::isnan(x)) x = -std::numeric_limits<double>::infinity();
    x += 0.0;
    uint64_t bits;
    std::memcpy(&bits, &x, sizeof(bits));
    return bits >> 63 ? ~bits : bits | uint64_t{1} << 63;
  }

  // The keep-th largest value, eight bits at a time, and how many of those equal to it are among the best.
  static uint64_t threshold(const uint64_t *values, int64_t count, int64_t keep, int64_t &ties) {
    uint64_t prefix = 0, mask = 0;
    int64_t wanted = keep;
    for (int shift = 56; shift >= 0; shift -= 8) {
      int64_t histogram[256] = {};
      for (int64_t i = 0; i < count; ++i) histogram[values[i] >> shift & 255] += (values[i] & mask) == prefix;
      int digit = 255;
      while (digit > 0 && histogram[digit] < wanted) wanted -= histogram[digit--];
      prefix |= static_cast<uint64_t>(digit) << shift;
      mask |= uint64_t{255} << shift;
    }
    ties = wanted;
    return prefix;
  }

  static void run(void *context, int32_t worker, int64_t b) {
    const Selection &self = *static_cast<const Selection *>(context);
    uint64_t *importance = self.importance + worker * self.tokens;
    for (int64_t n = 0; n < self.tokens; ++n) importance[n] = ordered(self.join_heads(b, n));
    int64_t ties = 0, *out = self.out + b * self.keep;
    const uint64_t lowest = threshold(importance, self.tokens, self.keep, ties);
    for (int64_t n = 0; n < self.tokens; ++n) {
      if (importance[n] > lowest || (importance[n] == lowest && ties-- > 0)) *out++ = n;
    }
  }
};

}  // namespace

extern "C" int32_t atedm_select_tokens(const float *scores, const int64_t scores_stride[3], int64_t batch,
                                       int64_t heads, int64_t tokens, int64_t keep, int32_t reduction, int64_t *out,
                                       int32_t threads) {
  if (batch < 0 || heads < 0 || tokens < 0 || keep < 0 || keep > tokens) return ATEDM_INVALID;
  if (reduction != ATEDM_RMS && reduction != ATEDM_MEAN) return ATEDM_INVALID;
  if (batch * keep == 0) return ATEDM_OK;
  if (threads > batch) threads = static_cast<int32_t>(batch);
  if (threads < 1) threads = 1;
  void *scratch = atedm::allocate(static_cast<size_t>(threads * tokens) * sizeof(uint64_t));
  if (scratch == nullptr) return ATEDM_OUT_OF_MEMORY;
  Selection selection{scores, scores_stride, heads, tokens, keep, reduction == ATEDM_RMS, out,
                      static_cast<uint64_t *>(scratch)};
  atedm::run_parallel(threads, batch, Selection::run, &selection);
  atedm::release(scratch);
  return ATEDM_OK;
}
