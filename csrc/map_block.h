// The map in blocks: one head, up to kBlockKeys keys, every query. A block is a work item; its sums run over the rows
// in one fixed order, so results do not depend on how many threads share the blocks.
#pragma once

#include "map_tile.h"

namespace atedm {
namespace ATEDM_NAMESPACE {

ATEDM_INLINE bool valid(const atedm_map &map) {
  return map.dtype >= ATEDM_FLOAT32 && map.dtype <= ATEDM_FLOAT16 && map.head_dim >= 0 &&
         map.head_dim <= kMaxHeadDim && map.batch >= 0 && map.heads >= 0 && map.queries >= 0 && map.keys >= 0;
}

// The scale of logits for exponentials in base 2.
ATEDM_INLINE float base_2_scale(const atedm_map &map) { return static_cast<float>(map.scale * 1.4426950408889634); }

// One head of the map.
struct Head {
  const char *q, *k;
  const float *lse;
  int64_t lse_stride;
  const atedm_map &map;
  float scale;

  Head(const atedm_map &map, int64_t pair) : map(map) {
    const int64_t b = pair / map.heads, h = pair % map.heads, element = bytes_of(map.dtype);
    q = static_cast<const char *>(map.q) + (b * map.q_stride[0] + h * map.q_stride[1]) * element;
    k = static_cast<const char *>(map.k) + (b * map.k_stride[0] + h * map.k_stride[1]) * element;
    lse = map.lse + b * map.lse_stride[0] + h * map.lse_stride[1];
    lse_stride = map.lse_stride[2];
    scale = base_2_scale(map);
  }
  const char *query(int64_t row) const { return q + row * map.q_stride[2] * bytes_of(map.dtype); }
  const char *key(int64_t column) const { return k + column * map.k_stride[2] * bytes_of(map.dtype); }
  float shift(int64_t row) const { return load_as<float>(lse + row * lse_stride) * -kLog2E; }
};

// Working memory of a thread.
template <class Dot>
struct BlockScratch {
  typename Dot::Unit *panels, *queries;
  alignas(64) float shift[kBlockRows], weight[kBlockRows], logits[kBlockRows * kPanel];

  static int64_t bytes(int64_t head_dim) {
    return (kBlockKeys + kBlockRows) * Dot::depth(head_dim) * static_cast<int64_t>(sizeof(typename Dot::Unit));
  }
  BlockScratch(char *memory, int64_t head_dim)
      : panels(reinterpret_cast<typename Dot::Unit *>(memory)), queries(panels + kBlockKeys * Dot::depth(head_dim)) {}

  void load_queries(const Head &head, int64_t first, int64_t rows) {
    const atedm_map &map = head.map;
    const int64_t depth = Dot::depth(map.head_dim);
    for (int64_t r = 0; r < rows; ++r) {
      Dot::load(head.query(first + r), map.q_stride[3], map.dtype, map.head_dim, queries + r * depth);
      shift[r] = head.shift(first + r);
    }
    // The last tile reads rows past the end: their results are unused, but they must be initialised.
    for (int64_t r = rows; r < round_up(rows, Dot::kRows); ++r) {
      for (int64_t d = 0; d < depth; ++d) queries[r * depth + d] = typename Dot::Unit{};
      shift[r] = 0;
    }
  }
};

// A row of a panel: exp2(logits * scale + shift).
ATEDM_INLINE void map_row(const float *logits, Vf scale, Vf shift, Vf (&out)[kVectors]) {
  ATEDM_UNROLL for (int v = 0; v < kVectors; ++v) out[v] = load_as<Vf>(logits + v * kLanes) * scale + shift;
  exp2(out);
}

// Calls visit(panel, first_row, rows, logits) for every panel of the block and every kBlockRows queries; logits are
// [rows, kPanel].
template <class Dot, class Visit>
inline void for_each_panel(const Head &head, int64_t first_key, int64_t keys, BlockScratch<Dot> &scratch,
                           const Visit &visit) {
  const atedm_map &map = head.map;
  const int64_t depth = Dot::depth(map.head_dim);
  const TileUnit unit;
  const auto key_at = [&](int64_t j) { return first_key + j; };
  load_panels<Dot>(head.k, map.k_stride, map.dtype, map.head_dim, keys, key_at, scratch.panels);
  for (int64_t first_row = 0; first_row < map.queries; first_row += kBlockRows) {
    const int64_t rows = smaller(kBlockRows, map.queries - first_row);
    scratch.load_queries(head, first_row, rows);
    for (int64_t panel = 0; panel * kPanel < keys; ++panel) {
      panel_logits<Dot>(scratch.queries, rows, scratch.panels + panel * kPanel * depth, depth, scratch.logits);
      visit(panel, first_row, rows, scratch.logits);
    }
  }
}

// sums[j] = sum over i of weights_i A_ij for the block's keys, rounded up to whole panels.
template <class Dot>
inline void block_sums(const Head &head, int64_t first_key, int64_t keys, const float *weights, int64_t weights_stride,
                       BlockScratch<Dot> &scratch, float *sums) {
  const float uniform = 1.0f / static_cast<float>(head.map.queries);
  for (int64_t j = 0; j < round_up(keys, kPanel); ++j) sums[j] = 0;
  for_each_panel(head, first_key, keys, scratch,
                 [&](int64_t panel, int64_t first_row, int64_t rows, const float *logits) {
    if (panel == 0) {
      for (int64_t r = 0; r < rows; ++r) {
        scratch.weight[r] = weights == nullptr ? uniform : load_as<float>(weights + (first_row + r) * weights_stride);
      }
    }
    const Vf scale = splat(head.scale);
    Vf sum[kVectors] = {};
    for (int64_t r = 0; r < rows; ++r, logits += kPanel) {
      const Vf shift = splat(scratch.shift[r]), weight = splat(scratch.weight[r]);
      Vf a[kVectors];
      map_row(logits, scale, shift, a);
      ATEDM_UNROLL for (int v = 0; v < kVectors; ++v) sum[v] += a[v] * weight;
    }
    float *out = sums + panel * kPanel;
    ATEDM_UNROLL for (int v = 0; v < kVectors; ++v) {
      store_as(out + v * kLanes, load_as<Vf>(out + v * kLanes) + sum[v]);
    }
  });
}

}  // namespace ATEDM_NAMESPACE
}  // namespace atedm
