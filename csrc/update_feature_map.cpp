// cache[b, index[b, s], c] = x[b, s, c], then out[b, c, n] = residual[b, c, n] + cache[b, n, c], in one pass: a block's
// new rows are written just before they are added, while they are in the processor's cache.
#include "feature_map.h"

namespace atedm {
namespace ATEDM_NAMESPACE {
namespace {

// `count` elements of one size, unchanged.
inline void copy_row(const char *from, int64_t from_stride, char *to, int64_t to_stride, int64_t bytes, int64_t count) {
  if (from_stride == 1 && to_stride == 1) {
    __builtin_memcpy(to, from, static_cast<size_t>(count * bytes));
  } else if (bytes == 2) {
    for (int64_t i = 0; i < count; ++i) store_as(to + i * to_stride * 2, load_as<uint16_t>(from + i * from_stride * 2));
  } else {
    for (int64_t i = 0; i < count; ++i) store_as(to + i * to_stride * 4, load_as<uint32_t>(from + i * from_stride * 4));
  }
}

// The first slot of batch row `b` whose token is not below `token`; the index ascends.
inline int64_t first_slot(const atedm_feature_map &map, int64_t b, int64_t token) {
  int64_t low = 0, high = map.slots;
  while (low < high) {
    const int64_t middle = low + (high - low) / 2;
    if (index_at(map, b, middle) < token) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

}  // namespace

int32_t update_feature_map(const atedm_feature_map &map, void *cache, const int64_t *cache_stride, int32_t threads) {
  return for_token_blocks(map, threads, [&](int64_t b, int64_t first, int64_t count) {
    const int64_t bytes = bytes_of(map.x_dtype);
    char *rows[kTileTokens];
    for (int64_t i = 0; i < count; ++i) {
      rows[i] = static_cast<char *>(cache) + (b * cache_stride[0] + (first + i) * cache_stride[1]) * bytes;
    }
    // A token of another block, or out of range, is skipped: no two threads write one row, and none writes outside.
    for (int64_t slot = first_slot(map, b, first); slot < map.slots; ++slot) {
      const int64_t token = index_at(map, b, slot);
      if (token >= first + count) break;
      if (token < first) continue;
      const char *row = static_cast<const char *>(map.x) + (b * map.x_stride[0] + slot * map.x_stride[1]) * bytes;
      copy_row(row, map.x_stride[2], rows[token - first], cache_stride[2], bytes, map.channels);
    }
    add_rows(map, b, first, count, rows, cache_stride[2]);
  });
}

}  // namespace ATEDM_NAMESPACE
}  // namespace atedm
