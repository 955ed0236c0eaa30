// A head's map, computed once and kept for the steps of a power iteration.
#pragma once

#include "map_block.h"

namespace atedm {
namespace ATEDM_NAMESPACE {

// Two rows of the map in float32.
struct KeptFloat {
  static constexpr bool kRounds = false;
  static constexpr int64_t kPairBytes = 2 * kPanel * 4;
  static ATEDM_INLINE void put(char *pair, int v, Vf first, Vf second, Vf &) {
    store_as(pair + v * kLanes * 4, first);
    store_as(pair + (kPanel + v * kLanes) * 4, second);
  }
  static ATEDM_INLINE void get(const char *pair, int v, Vf &first, Vf &second) {
    first = load_as<Vf>(pair + v * kLanes * 4);
    second = load_as<Vf>(pair + (kPanel + v * kLanes) * 4);
  }
};

// Two rows of the map in 16 bits an entry: no sign, 6 bits of exponent, 10 of mantissa, for 2^-63 to 2. That is fp16's
// precision with a range in which no attention that counts vanishes, and any level unpacks it in two instructions.
struct Kept16 {
  static constexpr bool kRounds = true;
  static constexpr int64_t kPairBytes = kPanel * 4;
  static constexpr float kLargest = 1.5f;  // entries above it are not attention, and do not fit
  static constexpr uint32_t kField = 0x1fffe000, kTop = 0x20000000;  // of a float32
  static ATEDM_INLINE Vf unpack(Vu bits) { return bits_as<Vf>((bits & kField) | kTop); }
  static ATEDM_INLINE void put(char *pair, int v, Vf first, Vf second, Vf &kept_sum) {
    const Vf least = splat(0x1p-63f);
    const Vu a = bits_as<Vu>(max_or_second(first, least)) + 0x1000;  // rounds the bits that fall away
    const Vu b = bits_as<Vu>(max_or_second(second, least)) + 0x1000;
    store_as(pair + v * kLanes * 4, ((a >> 13) & 0xffff) | ((b << 3) & 0xffff0000));
    kept_sum += unpack(a) + unpack(b);
  }
  static ATEDM_INLINE void get(const char *pair, int v, Vf &first, Vf &second) {
    const Vu bits = load_as<Vu>(pair + v * kLanes * 4);
    first = unpack(bits << 13);
    second = unpack(bits >> 3);
  }
};

// The panels of a head follow each other; in a panel, its rows.
template <class Kept>
ATEDM_INLINE int64_t kept_panel_bytes(int64_t rows) {
  return (rows + 1) / 2 * Kept::kPairBytes;
}

// The first step for one block: keeps its part of the map at `kept` and gives the sums of its columns, and what the kept
// columns must be multiplied by. False where an entry does not fit.
template <class Dot, class Kept>
bool keep_block(const Head &head, int64_t first_key, int64_t keys, BlockScratch<Dot> &scratch, char *kept, float *sums,
                float *correction) {
  const int64_t panel_bytes = kept_panel_bytes<Kept>(head.map.queries);
  alignas(64) float kept_sums[kBlockKeys], largest[kBlockKeys];
  for (int64_t j = 0; j < round_up(keys, kPanel); ++j) sums[j] = kept_sums[j] = largest[j] = 0;
  for_each_panel(head, first_key, keys, scratch, [&](int64_t panel, int64_t first_row, int64_t, const auto &tiles) {
    char *out = kept + panel * panel_bytes + first_row / 2 * Kept::kPairBytes;
    const Vf scale = splat(head.scale);
    Vf sum[kVectors] = {}, kept_sum[kVectors] = {}, top[kVectors] = {};
    tiles([&](int64_t row, int64_t rows_here, const auto &logits) ATEDM_LAMBDA_INLINE {
      ATEDM_UNROLL for (int r = 0; r < Dot::kRows; r += 2) {
        if (r >= rows_here) break;
        const Vf shift = splat(scratch.shift[row + r]), shift1 = splat(scratch.shift[row + r + 1]);
        const bool both = r + 1 < rows_here;
        ATEDM_UNROLL for (int v = 0; v < kVectors; ++v) {
          const Vf a = exp2(logits[r][v] * scale + shift);
          Vf b = exp2(logits[r + 1][v] * scale + shift1);
          if (!both) b = Vf{};
          sum[v] += a + b;
          if (Kept::kRounds) top[v] = max_or_second(max_or_second(a, b), top[v]);
          Kept::put(out + (row + r) / 2 * Kept::kPairBytes, v, a, b, kept_sum[v]);
        }
      }
    });
    ATEDM_UNROLL for (int v = 0; v < kVectors; ++v) {
      const int64_t j = panel * kPanel + v * kLanes;
      store_as(sums + j, load_as<Vf>(sums + j) + sum[v]);
      store_as(kept_sums + j, load_as<Vf>(kept_sums + j) + kept_sum[v]);
      store_as(largest + j, max_or_second(load_as<Vf>(largest + j), top[v]));
    }
  });
  bool fits = true;
  const float uniform = 1.0f / static_cast<float>(head.map.queries);
  for (int64_t j = 0; j < round_up(keys, kPanel); ++j) {
    if (j < keys && Kept::kRounds && !(largest[j] <= Kept16::kLargest)) fits = false;
    correction[j] = Kept::kRounds ? sums[j] / kept_sums[j] : 1.0f;
    sums[j] *= uniform;
  }
  return fits;
}

// sums[j] = sum over i of scores_i A_ij from the kept map, for one panel. `scores` is 0 past the last token.
template <class Kept>
void panel_sums(const char *kept, const float *scores, int64_t row_pairs, float *sums) {
  Vf even[kVectors] = {}, odd[kVectors] = {};
  for (int64_t i = 0; i < row_pairs; ++i, kept += Kept::kPairBytes) {
    const Vf first_score = splat(scores[2 * i]), second_score = splat(scores[2 * i + 1]);
    ATEDM_UNROLL for (int v = 0; v < kVectors; ++v) {
      Vf first, second;
      Kept::get(kept, v, first, second);
      even[v] += first * first_score;
      odd[v] += second * second_score;
    }
  }
  ATEDM_UNROLL for (int v = 0; v < kVectors; ++v) store_as(sums + v * kLanes, even[v] + odd[v]);
}

}  // namespace ATEDM_NAMESPACE
}  // namespace atedm
