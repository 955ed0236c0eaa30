// The power iteration s <- A^T s, normalised, of every head.
//
// The first step computes the map and keeps it, for as many heads at a time as the cache holds. Later steps only read
// it. Up to 512 tokens, the map is kept in float32. The map of a 4096-token head would take 67 MB, more than the memory
// bus can deliver in time, and that of a 1024-token head twice what the second-level cache holds: both are kept in 16
// bits. The exact column sums of the first step are known, so each column is corrected for the digits cut off. After
// five iterations, scores then differ from float64 by 2e-5 (rms) to 2e-4 (largest) if logits spread as in SDXL, and by
// 6e-4 at most on far more peaked maps, where two or three entries decide a sum. With float32 or without a kept map,
// they differ by 1e-5. If there are scores to start from, the first step also reads the map that it has just kept.
#include "kept_map.h"
#include "power_iteration.h"

namespace atedm {
namespace ATEDM_NAMESPACE {

// Size of the maps of several heads that stay in the last-level cache during the iteration.
constexpr int64_t kCacheBytes = 16 << 20;

template <class Dot, class Kept>
struct Ranking {
  const atedm_map &map;
  const Start start;
  const bool keeps;  // whether the map is kept; else every step recomputes it
  const int32_t first_weighted = start.values == nullptr ? 1 : 0;  // the first step whose weights are not all the same
  const int64_t tokens = map.queries, pairs = map.batch * map.heads;
  const int64_t blocks = (tokens + kBlockKeys - 1) / kBlockKeys, columns = blocks * kBlockKeys;
  const int64_t padded = round_up(tokens, 2);
  const int64_t panel_bytes = kept_panel_bytes<Kept>(tokens);
  const int64_t map_bytes = keeps ? round_up((tokens + kPanel - 1) / kPanel * panel_bytes, 64) : 0;
  const int64_t scratch_bytes = round_up(BlockScratch<Dot>::bytes(map.head_dim), 64);
  int64_t group = 0;  // heads at a time
  Scratch memory{};
  char *maps{}, *scratch{};
  float *raw{}, *correction{}, *scores{};
  uint8_t *fits{};
  int64_t *running{};

  bool prepare(int32_t threads) {
    const int64_t cached = keeps ? larger<int64_t>(1, kCacheBytes / larger<int64_t>(map_bytes, 1)) : pairs;
    group = smaller(pairs, larger(cached, (4 * int64_t{threads} + blocks - 1) / blocks));
    const int64_t at_maps = memory.add(group * map_bytes), at_scratch = memory.add(threads * scratch_bytes);
    const int64_t at_raw = memory.add(group * columns * 4), at_correction = memory.add(group * columns * 4);
    const int64_t at_scores = memory.add(group * padded * 4);
    const int64_t at_fits = memory.add(group * blocks), at_running = memory.add(group * 8);
    if (!memory.allocate()) return false;
    maps = memory.at<char>(at_maps), scratch = memory.at<char>(at_scratch);
    raw = memory.at<float>(at_raw), correction = memory.at<float>(at_correction);
    scores = memory.at<float>(at_scores);
    fits = memory.at<uint8_t>(at_fits), running = memory.at<int64_t>(at_running);
    return true;
  }

  // One step of head `base + slot`, for one block of its columns.
  void step(int64_t base, int64_t slot, int64_t block, int32_t iteration, int32_t worker) {
    const int64_t first_key = block * kBlockKeys, keys = smaller(kBlockKeys, tokens - first_key);
    const Head head(map, base + slot);
    BlockScratch<Dot> work(scratch + worker * scratch_bytes, map.head_dim);
    char *kept = maps + slot * map_bytes + first_key / kPanel * panel_bytes;
    float *sums = raw + slot * columns + first_key, *factor = correction + slot * columns + first_key;
    const float *weights = scores + slot * padded;
    const bool fills = iteration == 0 && keeps;
    uint8_t &fit = fits[slot * blocks + (fills ? block : 0)];  // after the first step, block 0's flag is the head's
    if (fills) {
      fit = keep_block<Dot, Kept>(head, first_key, keys, work, kept, sums);
      __builtin_memcpy(factor, sums, static_cast<size_t>(keys) * 4);
      if (first_weighted > 0) return;
    }
    if (keeps && fit) {
      const bool plain = Kept::kCuts && iteration == first_weighted;
      alignas(64) float cut_sums[kBlockKeys];
      for (int64_t j = 0; j < keys; j += kPanel, kept += panel_bytes) {
        (plain ? panel_sums<Kept, true> : panel_sums<Kept, false>)(kept, weights, padded / 2, sums + j, cut_sums + j);
      }
      for (int64_t j = 0; plain && j < keys; ++j) factor[j] /= cut_sums[j];
      for (int64_t j = 0; Kept::kCuts && j < keys; ++j) sums[j] *= factor[j];
    } else {
      block_sums(head, first_key, keys, weights, 1, work, sums);
    }
  }

  void rank(int64_t base, int64_t heads, int32_t max_iterations, double tolerance, int32_t *iterations,
            int32_t threads) {
    for (int64_t slot = 0; slot < heads; ++slot) {
      float *own = scores + slot * padded;
      start_from(start.of(map, base + slot), start.token_stride(), own, tokens);
      for (int64_t i = tokens; i < padded; ++i) own[i] = 0;
      running[slot] = slot;
    }
    for (int64_t slot = 0; slot < heads; ++slot) iterations[base + slot] = 0;
    for (int32_t iteration = 0; iteration < max_iterations && heads > 0; ++iteration) {
      const int64_t items = heads * blocks;
      parallel(threads, items, [&](int32_t worker, int64_t item) {
        if (iteration % 2) item = items - 1 - item;  // in reverse: first what the cache still holds from the last step
        step(base, running[item / blocks], item % blocks, iteration, worker);
      });
      int64_t still = 0;
      for (int64_t i = 0; i < heads; ++i) {
        const int64_t slot = running[i];
        uint8_t &fit = fits[slot * blocks];
        for (int64_t block = 0; iteration == 0 && keeps && block < blocks; ++block) fit &= fits[slot * blocks + block];
        ++iterations[base + slot];
        if (!normalise(scores + slot * padded, raw + slot * columns, tokens, tolerance)) running[still++] = slot;
      }
      heads = still;
    }
  }
};

int32_t weighted_page_rank(const atedm_map &map, int32_t max_iterations, double tolerance, const float *initial,
                           const int64_t *initial_stride, float *scores, int32_t *iterations, int32_t threads) {
  if (!valid(map) || map.queries != map.keys) return ATEDM_INVALID;
  const int64_t tokens = map.queries, pairs = map.batch * map.heads;
  if (pairs == 0 || tokens == 0) return ATEDM_OK;
  const auto rank_all = [&](auto dot, auto kept, bool keeps) -> int32_t {
    Ranking<decltype(dot), decltype(kept)> ranking{map, {initial, initial_stride}, keeps};
    threads = threads_for(threads, pairs * ranking.blocks, tokens * kBlockKeys * map.head_dim);
    if (!ranking.prepare(threads)) return ATEDM_OUT_OF_MEMORY;
    for (int64_t base = 0; base < pairs; base += ranking.group) {
      const int64_t heads = smaller(ranking.group, pairs - base);
      ranking.rank(base, heads, max_iterations, tolerance, iterations, threads);
      for (int64_t slot = 0; slot < heads; ++slot) {
        __builtin_memcpy(scores + (base + slot) * tokens, ranking.scores + slot * ranking.padded,
                         static_cast<size_t>(tokens) * 4);
      }
    }
    return ATEDM_OK;
  };
  return with_dot(map.dtype, [&](auto dot) -> int32_t {
    // In double, which does not overflow even for more than 2^31 tokens per side.
    const double entries = static_cast<double>(tokens) * static_cast<double>(tokens);
    if (max_iterations > 1 && entries * 4 <= float_map_limit()) return rank_all(dot, KeptFloat{}, true);
    return rank_all(dot, Kept16{}, max_iterations > 1 && entries * 2 <= sixteen_bit_map_limit());
  });
}

}  // namespace ATEDM_NAMESPACE
}  // namespace atedm
