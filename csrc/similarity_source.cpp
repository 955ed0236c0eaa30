// For each dropped token, the kept one that attends to it most, summed over the heads (their mean has the same order).
//
// Only rows of kept tokens and columns of dropped ones are computed. Tiles are transposed: the kept tokens' queries are
// stored in panels, the dropped tokens' keys are broadcast. A kept token stays in its lane, so the logsumexps of a
// panel stay in registers and the search needs no shuffle. Heads are innermost: a tile's sum over them stays in the
// first-level cache, and no part of the map is ever written out.
#include "map_block.h"

namespace atedm {
namespace ATEDM_NAMESPACE {
namespace {

template <class Dot>
struct SourceSearch {
  using Unit = typename Dot::Unit;
  const atedm_map &map;
  const int64_t keep;
  const int64_t depth = Dot::depth(map.head_dim), pairs = map.batch * map.heads;
  const int64_t panels = (keep + kPanel - 1) / kPanel;
  Unit *queries = nullptr;  // [pairs, panels], of the kept tokens
  float *shift = nullptr;   // [pairs, panels]

  // Working memory of a thread.
  struct Work {
    Unit *keys;  // [heads, rows], of dropped tokens
    float *logits, *similarity, *best;
    uint32_t *best_panel;
  };
  int64_t work_bytes() const { return round_up(map.heads * kBlockRows * depth * 4 + kBlockRows * kPanel * 16, 64); }
  Work work(char *memory) const {
    Work w;
    w.similarity = reinterpret_cast<float *>(memory);
    w.best = w.similarity + kBlockRows * kPanel;
    w.best_panel = reinterpret_cast<uint32_t *>(w.best + kBlockRows * kPanel);
    w.logits = reinterpret_cast<float *>(w.best_panel + kBlockRows * kPanel);
    w.keys = reinterpret_cast<Unit *>(w.logits + kBlockRows * kPanel);
    return w;
  }

  // Past the last kept token, a panel repeats it, as load_panels does. The search chooses the first of equals.
  template <class TokenAt>
  void load_queries(int64_t pair, const TokenAt &token_at) const {
    const Head head(map, pair);
    const int64_t first = pair * panels * kPanel;
    load_panels<Dot>(head.q, map.q_stride, map.dtype, map.head_dim, keep, token_at, queries + first * depth);
    for (int64_t j = 0; j < panels * kPanel; ++j) shift[first + j] = head.shift(token_at(smaller(j, keep - 1)));
  }

  void load_keys(int64_t batch, const int64_t *rows, int64_t count, const Work &w) const {
    for (int64_t h = 0; h < map.heads; ++h) {
      const Head head(map, batch * map.heads + h);
      for (int64_t r = 0; r < round_up(count, Dot::kRows); ++r) {
        Dot::load(head.key(rows[smaller(r, count - 1)]), map.k_stride[3], map.dtype, map.head_dim,
                  w.keys + (h * kBlockRows + r) * depth);
      }
    }
  }

  // w.similarity[r, j] = sum over the heads of A[index[panel, j], rows[r]]
  void add_heads(int64_t batch, int64_t panel, int64_t count, const Work &w) const {
    const Vf scale = splat(base_2_scale(map));
    __builtin_memset(w.similarity, 0, static_cast<size_t>(count * kPanel * 4));
    for (int64_t h = 0; h < map.heads; ++h) {
      const int64_t first = ((batch * map.heads + h) * panels + panel) * kPanel;
      panel_logits<Dot>(w.keys + h * kBlockRows * depth, count, queries + first * depth, depth, w.logits);
      Vf shifts[kVectors];
      ATEDM_UNROLL for (int v = 0; v < kVectors; ++v) shifts[v] = load_as<Vf>(shift + first + v * kLanes);
      for (int64_t r = 0; r < count; ++r) {
        Vf attention[kVectors];
        ATEDM_UNROLL for (int v = 0; v < kVectors; ++v) {
          attention[v] = load_as<Vf>(w.logits + r * kPanel + v * kLanes) * scale + shifts[v];
        }
        exp2(attention);
        float *sum = w.similarity + r * kPanel;
        ATEDM_UNROLL for (int v = 0; v < kVectors; ++v) {
          store_as(sum + v * kLanes, load_as<Vf>(sum + v * kLanes) + attention[v]);
        }
      }
    }
  }

  void find(int64_t batch, const int64_t *rows, int64_t count, const Work &w, int64_t *source) const {
    const TileUnit unit;
    load_keys(batch, rows, count, w);
    for (int64_t i = 0; i < count * kPanel; ++i) w.best[i] = -1, w.best_panel[i] = 0;
    for (int64_t panel = 0; panel < panels; ++panel) {
      add_heads(batch, panel, count, w);
      for (int64_t i = 0; i < count * kPanel; i += kLanes) {
        // Strictly larger: a tie stays with the lower slot. NaN is never larger.
        const Vf value = load_as<Vf>(w.similarity + i), best = load_as<Vf>(w.best + i);
        const Vu is_larger = bits_as<Vu>(value > best);
        store_as(w.best + i, bits_as<Vf>((bits_as<Vu>(value) & is_larger) | (bits_as<Vu>(best) & ~is_larger)));
        const Vu previous = load_as<Vu>(w.best_panel + i), now = splat(static_cast<uint32_t>(panel));
        store_as(w.best_panel + i, (now & is_larger) | (previous & ~is_larger));
      }
    }
    for (int64_t r = 0; r < count; ++r) {
      float best = -2;
      int64_t slot = 0;
      for (int64_t j = 0; j < kPanel; ++j) {
        const float value = w.best[r * kPanel + j];
        const int64_t candidate = int64_t{w.best_panel[r * kPanel + j]} * kPanel + j;
        if (value > best || (value == best && candidate < slot)) best = value, slot = candidate;
      }
      source[rows[r]] = slot;
    }
  }
};

}  // namespace

int32_t similarity_source(const atedm_map &map, const int64_t *index, const int64_t *index_stride, int64_t keep,
                          int64_t *source, int32_t threads) {
  if (!valid(map) || map.queries != map.keys || keep < 0 || keep > map.queries) return ATEDM_INVALID;
  const int64_t tokens = map.queries, batches = map.batch, heads = map.heads;
  if (batches == 0 || tokens == 0) return ATEDM_OK;
  if (keep == 0) return ATEDM_INVALID;  // nothing to refill the tokens from
  const auto kept = [&](int64_t batch, int64_t slot) {
    const int64_t token = load_as<int64_t>(index + batch * index_stride[0] + slot * index_stride[1]);
    return larger<int64_t>(0, smaller(token, tokens - 1));
  };
  return with_dot(map.dtype, [&](auto dot) -> int32_t {
    SourceSearch<decltype(dot)> search{map, keep};
    const int64_t row_blocks = (tokens + kBlockRows - 1) / kBlockRows;
    threads = threads_for(threads, batches * row_blocks, heads * keep * map.head_dim * kBlockRows);
    Scratch memory;
    const int64_t columns = search.pairs * search.panels * kPanel;
    const int64_t at_queries = memory.add(columns * search.depth * 4), at_shift = memory.add(columns * 4);
    const int64_t at_dropped = memory.add(batches * tokens * 8), at_count = memory.add(batches * 8);
    const int64_t at_work = memory.add(threads * search.work_bytes());
    if (!memory.allocate()) return ATEDM_OUT_OF_MEMORY;
    search.queries = memory.at<typename decltype(dot)::Unit>(at_queries), search.shift = memory.at<float>(at_shift);
    int64_t *dropped = memory.at<int64_t>(at_dropped), *dropped_count = memory.at<int64_t>(at_count);

    for (int64_t b = 0; b < batches; ++b) {
      int64_t *slots = source + b * tokens, count = 0;
      for (int64_t i = 0; i < tokens; ++i) slots[i] = -1;
      for (int64_t slot = 0; slot < keep; ++slot) slots[kept(b, slot)] = slot;
      for (int64_t i = 0; i < tokens; ++i) {
        if (slots[i] < 0) dropped[b * tokens + count++] = i;
      }
      dropped_count[b] = count;
    }
    parallel(threads, search.pairs, [&](int32_t, int64_t pair) {
      search.load_queries(pair, [&](int64_t slot) { return kept(pair / heads, slot); });
    });
    parallel(threads, batches * row_blocks, [&](int32_t worker, int64_t item) {
      const int64_t b = item / row_blocks, first = item % row_blocks * kBlockRows;
      const int64_t count = smaller(kBlockRows, dropped_count[b] - first);
      if (count <= 0) return;
      const auto work = search.work(memory.at<char>(at_work) + worker * search.work_bytes());
      search.find(b, dropped + b * tokens + first, count, work, source + b * tokens);
    });
    return ATEDM_OK;
  });
}

}  // namespace ATEDM_NAMESPACE
}  // namespace atedm
