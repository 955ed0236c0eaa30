// A head's map, computed once and kept for the steps of a power iteration.
#pragma once

#include "map_block.h"

namespace atedm {
namespace ATEDM_NAMESPACE {

// Two rows of the map in float32.
struct KeptFloat {
  static constexpr bool kCuts = false;
  static constexpr int64_t kPairBytes = 2 * kPanel * 4;
  static ATEDM_INLINE void put(char *pair, int v, Vf first, Vf second) {
    store_as(pair + v * kLanes * 4, first);
    store_as(pair + (kPanel + v * kLanes) * 4, second);
  }
  static ATEDM_INLINE void get(const char *pair, int v, Vf &first, Vf &second) {
    first = load_as<Vf>(pair + v * kLanes * 4);
    second = load_as<Vf>(pair + (kPanel + v * kLanes) * 4);
  }
};

// Two rows of the map in 16 bits per entry: no sign, 6 bits of exponent and 10 of mantissa, which cover 2^-63 to 2.
// That is fp16's precision, with a range in which no significant attention vanishes, and any ISA unpacks it in two
// instructions. Digits are cut off, not rounded: the correction of each column removes the bias, and the remaining
// error is the same as with rounding.
struct Kept16 {
  static constexpr bool kCuts = true;
  static constexpr int64_t kPairBytes = kPanel * 4;
  static constexpr uint32_t kField = 0x1fffe000, kTop = 0x20000000;  // of a float32
  static constexpr uint32_t kTooLarge = 0x40000000;                  // set for 2 and above, infinity and NaN included
  static ATEDM_INLINE Vf unpack(Vu bits) { return bits_as<Vf>((bits & kField) | kTop); }
  static ATEDM_INLINE void put(char *pair, int v, Vf first, Vf second) {
    const Vf lowest = splat(0x1p-63f);
    const Vu a = bits_as<Vu>(max_or_second(first, lowest)), b = bits_as<Vu>(max_or_second(second, lowest));
    store_as(pair + v * kLanes * 4, halves(a >> 13, b << 3));
  }
  static ATEDM_INLINE void get(const char *pair, int v, Vf &first, Vf &second) {
    const Vu bits = load_as<Vu>(pair + v * kLanes * 4);
    first = unpack(bits << 13);
    second = unpack(bits >> 3);
  }
  // The low half of every lane from `low`, the high half from `high`.
  static ATEDM_INLINE Vu halves(Vu low, Vu high) {
#if ATEDM_ISA >= ATEDM_AVX512
    return (Vu)_mm512_mask_blend_epi16(0xaaaaaaaa, (__m512i)low, (__m512i)high);
#elif ATEDM_ISA >= ATEDM_AVX2
    return (Vu)_mm256_blend_epi16((__m256i)low, (__m256i)high, 0xaa);
#else
    return (low & 0xffff) | (high & 0xffff0000);
#endif
  }
};

// The panels of a head follow one another in memory, and so do the rows of a panel.
template <class Kept>
ATEDM_INLINE int64_t kept_panel_bytes(int64_t rows) {
  return (rows + 1) / 2 * Kept::kPairBytes;
}

// The first step for one block: stores its part of the map at `kept` and sums its columns with weights 1. Returns false
// if an entry does not fit into the kept format.
template <class Dot, class Kept>
bool keep_block(const Head &head, int64_t first_key, int64_t keys, BlockScratch<Dot> &scratch, char *kept,
                float *sums) {
  const int64_t panel_bytes = kept_panel_bytes<Kept>(head.map.queries);
  alignas(64) uint32_t seen[kBlockKeys];  // bits of a column's entries, ORed
  for (int64_t j = 0; j < round_up(keys, kPanel); ++j) sums[j] = 0, seen[j] = 0;
  for_each_panel(head, first_key, keys, scratch,
                 [&](int64_t panel, int64_t first_row, int64_t rows, const float *logits) {
    char *out = kept + panel * panel_bytes + first_row / 2 * Kept::kPairBytes;
    const Vf scale = splat(head.scale);
    Vf sum[kVectors] = {};
    Vu bits[kVectors] = {};
    for (int64_t r = 0; r < rows; r += 2, logits += 2 * kPanel, out += Kept::kPairBytes) {
      Vf a[kVectors], b[kVectors];
      map_row(logits, scale, splat(scratch.shift[r]), a);
      map_row(logits + kPanel, scale, splat(scratch.shift[r + 1]), b);
      const Vu both = splat(r + 1 < rows ? ~uint32_t{0} : 0);  // the row past the last counts as zeros
      ATEDM_UNROLL for (int v = 0; v < kVectors; ++v) {
        b[v] = bits_as<Vf>(bits_as<Vu>(b[v]) & both);
        sum[v] += a[v] + b[v];
        if (Kept::kCuts) bits[v] |= bits_as<Vu>(a[v]) | bits_as<Vu>(b[v]);
        Kept::put(out, v, a[v], b[v]);
      }
    }
    ATEDM_UNROLL for (int v = 0; v < kVectors; ++v) {
      const int64_t j = panel * kPanel + v * kLanes;
      store_as(sums + j, load_as<Vf>(sums + j) + sum[v]);
      store_as(seen + j, load_as<Vu>(seen + j) | bits[v]);
    }
  });
  uint32_t all = 0;
  for (int64_t j = 0; j < keys; ++j) all |= seen[j];
  return !Kept::kCuts || (all & Kept16::kTooLarge) == 0;
}

// sums[j] = sum over i of scores_i A_ij from the kept map, for one panel; `scores` is 0 past the last token. With
// kPlain, also plain[j] = sum over i of A_ij.
template <class Kept, bool kPlain>
void panel_sums(const char *kept, const float *scores, int64_t row_pairs, float *sums, float *plain) {
  Vf even[kVectors] = {}, odd[kVectors] = {}, both[kVectors] = {};
  for (int64_t i = 0; i < row_pairs; ++i, kept += Kept::kPairBytes) {
    const Vf first_score = splat(scores[2 * i]), second_score = splat(scores[2 * i + 1]);
    ATEDM_UNROLL for (int v = 0; v < kVectors; ++v) {
      Vf first, second;
      Kept::get(kept, v, first, second);
      even[v] += first * first_score;
      odd[v] += second * second_score;
      if (kPlain) both[v] += first + second;
    }
  }
  ATEDM_UNROLL for (int v = 0; v < kVectors; ++v) {
    store_as(sums + v * kLanes, even[v] + odd[v]);
    if (kPlain) store_as(plain + v * kLanes, both[v]);
  }
}

}  // namespace ATEDM_NAMESPACE
}  // namespace atedm
