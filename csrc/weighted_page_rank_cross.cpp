// Importance of the queries of a cross-attention map: s_K <- A^T s_Q, s_Q <- (A s_K) / entropy, normalised.
//
// Text has few tokens, so a head's map is small. It is computed once, in float32, in chunks of rows, and kept. A map
// that is too large is recomputed for each of the two products.
#include "map_block.h"
#include "power_iteration.h"

namespace atedm {
namespace ATEDM_NAMESPACE {
namespace {

constexpr int64_t kChunkBytes = 1 << 20;
constexpr int64_t kCrossCacheBytes = 32 << 20;
constexpr float kEntropyFloor = 1e-6f;  // of a row that attends to only one key; as in the reference

// All ones in the lanes of columns before `count`.
ATEDM_INLINE Vu lanes_before(int64_t first, int64_t count) {
  Vu lane;
  ATEDM_UNROLL for (int i = 0; i < kLanes; ++i) lane[i] = static_cast<uint32_t>(i);
  return bits_as<Vu>(lane < splat(static_cast<uint32_t>(larger<int64_t>(0, count - first))));
}

ATEDM_INLINE float sum_of_lanes(Vf x) {
  float sum = 0;
  ATEDM_UNROLL for (int i = 0; i < kLanes; ++i) sum += x[i];
  return sum;
}

template <class Dot>
struct CrossRanking {
  const atedm_map &map;
  const Start start;
  const int64_t rows = map.queries, keys = map.keys, pairs = map.batch * map.heads;
  const int64_t width = round_up(keys, kPanel);
  const int64_t chunk_rows = smaller<int64_t>(512, larger<int64_t>(16, kChunkBytes / 4 / width));
  const int64_t chunks = (rows + chunk_rows - 1) / chunk_rows;
  const bool keeps = static_cast<double>(rows) * width * 4 <= sixteen_bit_map_limit();
  const int64_t scratch_bytes = round_up(BlockScratch<Dot>::bytes(map.head_dim), 64);
  int64_t group = 0;  // heads at a time
  Scratch memory{};
  float *maps{}, *entropy{}, *scores{}, *raw{}, *partial{}, *key_scores{};
  char *scratch{};
  int64_t *running{};

  bool prepare(int32_t threads) {
    const int64_t cached = keeps ? larger<int64_t>(1, kCrossCacheBytes / (rows * width * 4)) : pairs;
    group = smaller(pairs, larger(cached, (4 * int64_t{threads} + chunks - 1) / chunks));
    const int64_t at_maps = memory.add((keeps ? group * rows : threads * chunk_rows) * width * 4);
    const int64_t at_entropy = memory.add(group * rows * 4), at_scores = memory.add(group * rows * 4);
    const int64_t at_raw = memory.add(group * rows * 4), at_partial = memory.add(group * chunks * width * 4);
    const int64_t at_key_scores = memory.add(group * width * 4), at_scratch = memory.add(threads * scratch_bytes);
    const int64_t at_running = memory.add(group * 8);
    if (!memory.allocate()) return false;
    maps = memory.at<float>(at_maps), entropy = memory.at<float>(at_entropy);
    scores = memory.at<float>(at_scores), raw = memory.at<float>(at_raw);
    partial = memory.at<float>(at_partial), key_scores = memory.at<float>(at_key_scores);
    scratch = memory.at<char>(at_scratch), running = memory.at<int64_t>(at_running);
    return true;
  }

  int64_t rows_of(int64_t chunk) const { return smaller(chunk_rows, rows - chunk * chunk_rows); }

  // One chunk of a head's map; its columns past the last key are 0.
  const float *chunk_of(int64_t base, int64_t slot, int64_t chunk, bool fill, int32_t worker) {
    float *out = maps + (keeps ? slot * rows + chunk * chunk_rows : worker * chunk_rows) * width;
    if (!fill && keeps) return out;
    atedm_map part = map;
    const int64_t first = chunk * chunk_rows;
    part.q = static_cast<const char *>(map.q) + first * map.q_stride[2] * bytes_of(map.dtype);
    part.lse = map.lse + first * map.lse_stride[2];
    part.queries = rows_of(chunk);
    const Head head(part, base + slot);
    BlockScratch<Dot> work(scratch + worker * scratch_bytes, map.head_dim);
    const Vf scale = splat(head.scale);
    for (int64_t key = 0; key < keys; key += kBlockKeys) {
      for_each_panel(head, key, smaller(kBlockKeys, keys - key), work,
                     [&](int64_t panel, int64_t first_row, int64_t count, const float *logits) {
        float *corner = out + first_row * width + key + panel * kPanel;
        for (int64_t r = 0; r < count; ++r) {
          const Vf shift = splat(work.shift[r]);
          ATEDM_UNROLL for (int v = 0; v < kVectors; ++v) {
            const Vf logit = load_as<Vf>(logits + r * kPanel + v * kLanes);
            store_as(corner + r * width + v * kLanes, logit * scale + shift);
          }
        }
      });
    }
    for (int64_t r = 0; r < part.queries; ++r) {  // from base-2 logs to the map, and to its rows' entropies
      Vf sum = {};
      for (int64_t j = 0; j < width; j += kLanes) {
        const Vf log = load_as<Vf>(out + r * width + j);
        Vf a[1] = {log};
        exp2(a);
        const Vu inside = lanes_before(j, keys);
        sum += bits_as<Vf>(bits_as<Vu>(a[0] * log) & inside);
        store_as(out + r * width + j, bits_as<Vf>(bits_as<Vu>(a[0]) & inside));
      }
      const float nats = sum_of_lanes(sum) * -0.693147181f;
      entropy[slot * rows + first + r] = nats < kEntropyFloor ? kEntropyFloor : nats;  // NaN stays
    }
    return out;
  }

  void add_to_keys(int64_t slot, int64_t chunk, const float *a) {
    float *sums = partial + (slot * chunks + chunk) * width;
    const float *s = scores + slot * rows + chunk * chunk_rows;
    for (int64_t j = 0; j < width; j += kPanel) {
      Vf sum[kVectors] = {};
      for (int64_t r = 0; r < rows_of(chunk); ++r) {
        const Vf score = splat(s[r]);
        ATEDM_UNROLL for (int v = 0; v < kVectors; ++v) {
          sum[v] += load_as<Vf>(a + r * width + j + v * kLanes) * score;
        }
      }
      ATEDM_UNROLL for (int v = 0; v < kVectors; ++v) store_as(sums + j + v * kLanes, sum[v]);
    }
  }

  void join_chunks(int64_t slot) {
    float *out = key_scores + slot * width;
    __builtin_memset(out, 0, static_cast<size_t>(width) * 4);
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      const float *sums = partial + (slot * chunks + chunk) * width;
      for (int64_t j = 0; j < width; ++j) out[j] += sums[j];
    }
  }

  void receive(int64_t slot, int64_t chunk, const float *a) {
    const float *key_score = key_scores + slot * width;
    for (int64_t r = 0; r < rows_of(chunk); ++r) {
      Vf sum = {};
      for (int64_t j = 0; j < width; j += kLanes) sum += load_as<Vf>(a + r * width + j) * load_as<Vf>(key_score + j);
      const int64_t at = slot * rows + chunk * chunk_rows + r;
      raw[at] = sum_of_lanes(sum) / entropy[at];
    }
  }

  void rank(int64_t base, int64_t heads, int32_t max_iterations, double tolerance, int32_t *iterations,
            int32_t threads) {
    for (int64_t slot = 0; slot < heads; ++slot) {
      start_from(start.of(map, base + slot), start.token_stride(), scores + slot * rows, rows);
      running[slot] = slot, iterations[base + slot] = 0;
    }
    for (int32_t iteration = 0; iteration < max_iterations && heads > 0; ++iteration) {
      parallel(threads, heads * chunks, [&](int32_t worker, int64_t item) {
        const int64_t slot = running[item / chunks], chunk = item % chunks;
        add_to_keys(slot, chunk, chunk_of(base, slot, chunk, iteration == 0, worker));
      });
      for (int64_t i = 0; i < heads; ++i) join_chunks(running[i]);
      parallel(threads, heads * chunks, [&](int32_t worker, int64_t item) {
        const int64_t slot = running[item / chunks], chunk = item % chunks;
        receive(slot, chunk, chunk_of(base, slot, chunk, false, worker));
      });
      int64_t still = 0;
      for (int64_t i = 0; i < heads; ++i) {
        const int64_t slot = running[i];
        ++iterations[base + slot];
        if (!normalise(scores + slot * rows, raw + slot * rows, rows, tolerance)) running[still++] = slot;
      }
      heads = still;
    }
  }
};

}  // namespace

int32_t weighted_page_rank_cross(const atedm_map &map, int32_t max_iterations, double tolerance, const float *initial,
                                 const int64_t *initial_stride, float *scores, int32_t *iterations, int32_t threads) {
  if (!valid(map)) return ATEDM_INVALID;
  if (map.batch * map.heads == 0 || map.queries == 0) return ATEDM_OK;
  if (map.keys == 0) return ATEDM_INVALID;  // a distribution over nothing
  return with_dot(map.dtype, [&](auto dot) -> int32_t {
    CrossRanking<decltype(dot)> ranking{map, {initial, initial_stride}};
    threads = threads_for(threads, ranking.pairs * ranking.chunks, ranking.chunk_rows * map.keys * map.head_dim);
    if (!ranking.prepare(threads)) return ATEDM_OUT_OF_MEMORY;
    for (int64_t base = 0; base < ranking.pairs; base += ranking.group) {
      const int64_t heads = smaller(ranking.group, ranking.pairs - base);
      ranking.rank(base, heads, max_iterations, tolerance, iterations, threads);
      __builtin_memcpy(scores + base * map.queries, ranking.scores, static_cast<size_t>(heads * map.queries) * 4);
    }
    return ATEDM_OK;
  });
}

}  // namespace ATEDM_NAMESPACE
}  // namespace atedm
