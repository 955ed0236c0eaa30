// out[b, c, n] = residual[b, c, n] + x[b, source[b, n], c], in channels-last or contiguous order.
#include "rows.h"
#include "map_tile.h"

namespace atedm {
namespace ATEDM_NAMESPACE {
namespace {

constexpr int64_t kTokens = 64, kChannels = 64;  // a tile: 16 KB in float32

// The residual at `count` tokens from `first`, one channel.
inline void load_tokens(const atedm_feature_map &map, const char *channel, int64_t first, int64_t count, float *out) {
  const int64_t *stride = map.residual_stride, element = bytes_of(map.residual_dtype);
  if (map.width == 1 || map.height == 1 || stride[2] == map.width * stride[3]) {
    const int64_t step = map.width == 1 ? stride[2] : stride[3];
    load_row(channel + first * step * element, step, map.residual_dtype, count, out);
    return;
  }
  for (int64_t i = 0; i < count; ++i) {
    const int64_t y = (first + i) / map.width, x = (first + i) % map.width;
    out[i] = load_element(channel + (y * stride[2] + x * stride[3]) * element, map.residual_dtype);
  }
}

void recover_tokens_block(const atedm_feature_map &map, int64_t b, int64_t first, int64_t count) {
  const int64_t positions = map.height * map.width, out_bytes = bytes_of(map.out_dtype);
  const int64_t x_bytes = bytes_of(map.x_dtype), residual_bytes = bytes_of(map.residual_dtype);
  const char *rows[kTokens];
  for (int64_t i = 0; i < count; ++i) {
    int64_t slot = load_as<int64_t>(map.source + b * map.source_stride[0] + (first + i) * map.source_stride[1]);
    slot = larger<int64_t>(0, smaller(slot, map.slots - 1));
    rows[i] = static_cast<const char *>(map.x) + (b * map.x_stride[0] + slot * map.x_stride[1]) * x_bytes;
  }
  const char *residual = static_cast<const char *>(map.residual) + b * map.residual_stride[0] * residual_bytes;
  char *out = static_cast<char *>(map.out) + b * map.channels * positions * out_bytes;
  alignas(64) float values[kTokens][kChannels], line[kTokens > kChannels ? kTokens : kChannels];
  for (int64_t c = 0; c < map.channels; c += kChannels) {
    const int64_t channels = smaller(kChannels, map.channels - c);
    for (int64_t i = 0; i < count; ++i) {
      load_row(rows[i] + c * map.x_stride[2] * x_bytes, map.x_stride[2], map.x_dtype, channels, values[i]);
    }
    if (map.channels_last) {
      for (int64_t i = 0; i < count; ++i) {
        const int64_t n = first + i, y = n / map.width, x = n % map.width;
        const int64_t at = c * map.residual_stride[1] + y * map.residual_stride[2] + x * map.residual_stride[3];
        load_row(residual + at * residual_bytes, map.residual_stride[1], map.residual_dtype, channels, line);
        for (int64_t j = 0; j < channels; ++j) line[j] += values[i][j];
        store_row(out + (n * map.channels + c) * out_bytes, map.out_dtype, channels, line);
      }
      continue;
    }
    for (int64_t j = 0; j < channels; ++j) {
      load_tokens(map, residual + (c + j) * map.residual_stride[1] * residual_bytes, first, count, line);
      for (int64_t i = 0; i < count; ++i) line[i] += values[i][j];
      store_row(out + ((c + j) * positions + first) * out_bytes, map.out_dtype, count, line);
    }
  }
}

}  // namespace

int32_t recover_feature_map(const atedm_feature_map &map, int32_t threads) {
  const auto known = [](int32_t dtype) { return dtype >= ATEDM_FLOAT32 && dtype <= ATEDM_FLOAT16; };
  if (!known(map.x_dtype) || !known(map.residual_dtype) || !known(map.out_dtype)) return ATEDM_INVALID;
  if (map.batch < 0 || map.channels < 0 || map.height < 0 || map.width < 0) return ATEDM_INVALID;
  const int64_t positions = map.height * map.width, blocks = (positions + kTokens - 1) / kTokens;
  if (map.batch * map.channels * positions == 0) return ATEDM_OK;
  if (map.slots <= 0) return ATEDM_INVALID;  // nothing to refill the positions from
  threads = threads_for(threads, map.batch * blocks, 16 * kTokens * map.channels);
  parallel(threads, map.batch * blocks, [&](int32_t, int64_t item) {
    const int64_t first = item % blocks * kTokens;
    recover_tokens_block(map, item / blocks, first, smaller(kTokens, positions - first));
  });
  return ATEDM_OK;
}

}  // namespace ATEDM_NAMESPACE
}  // namespace atedm
