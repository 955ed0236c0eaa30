// Weighted column sums of the attention map: one pass, nothing stored.
#include "map_block.h"

namespace atedm {
namespace ATEDM_NAMESPACE {

int32_t attention_column_sums(const atedm_map &map, const float *weights, const int64_t *weights_stride, float *out,
                              int32_t threads) {
  if (!valid(map)) return ATEDM_INVALID;
  return with_dot(map.dtype, [&](auto dot) -> int32_t {
    using Dot = decltype(dot);
    const int64_t blocks = (map.keys + kBlockKeys - 1) / kBlockKeys, pairs = map.batch * map.heads;
    threads = threads_for(threads, pairs * blocks, map.queries * smaller(map.keys, kBlockKeys) * map.head_dim);
    const int64_t scratch_bytes = round_up(BlockScratch<Dot>::bytes(map.head_dim), 64);
    Scratch memory;
    memory.add(threads * scratch_bytes);
    if (!memory.allocate()) return ATEDM_OUT_OF_MEMORY;
    parallel(threads, pairs * blocks, [&](int32_t worker, int64_t item) {
      const int64_t pair = item / blocks, first = item % blocks * kBlockKeys, b = pair / map.heads, h = pair % map.heads;
      const int64_t keys = smaller(kBlockKeys, map.keys - first);
      const float *w = weights == nullptr ? nullptr : weights + b * weights_stride[0] + h * weights_stride[1];
      BlockScratch<Dot> scratch(memory.at<char>(worker * scratch_bytes), map.head_dim);
      alignas(64) float sums[kBlockKeys];
      block_sums(Head(map, pair), first, keys, w, weights == nullptr ? 0 : weights_stride[2], scratch, sums);
      __builtin_memcpy(out + pair * map.keys + first, sums, static_cast<size_t>(keys) * 4);
    });
    return ATEDM_OK;
  });
}

}  // namespace ATEDM_NAMESPACE
}  // namespace atedm
