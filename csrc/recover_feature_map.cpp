// out[b, c, n] = residual[b, c, n] + x[b, index[b, n], c], in channels-last or contiguous order.
#include "feature_map.h"

namespace atedm {
namespace ATEDM_NAMESPACE {

int32_t recover_feature_map(const atedm_feature_map &map, int32_t threads) {
  if (map.slots <= 0 && !is_empty(map)) return ATEDM_INVALID;  // nothing to refill the positions from
  return for_token_blocks(map, threads, [&](int64_t b, int64_t first, int64_t count) {
    const char *rows[kTileTokens];
    for (int64_t i = 0; i < count; ++i) {
      const int64_t slot = larger<int64_t>(0, smaller(index_at(map, b, first + i), map.slots - 1));
      const int64_t at = b * map.x_stride[0] + slot * map.x_stride[1];
      rows[i] = static_cast<const char *>(map.x) + at * bytes_of(map.x_dtype);
    }
    add_rows(map, b, first, count, rows, map.x_stride[2]);
  });
}

}  // namespace ATEDM_NAMESPACE
}  // namespace atedm
