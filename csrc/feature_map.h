// Shared by the ops that fill a feature map: a block of tokens, each a row of channels, is added to the residual.
// Tokens are read along the channels and written along the layout of the map.
#pragma once

#include "map_tile.h"
#include "rows.h"

namespace atedm {
namespace ATEDM_NAMESPACE {

constexpr int64_t kTileTokens = 128, kTileChannels = 64;  // chosen by measurement
static_assert(kTileTokens % kLanes == 0 && kTileChannels % kLanes == 0, "whole squares");

// low = a0 b0 a1 b1 …, high = the same for the upper halves.
ATEDM_INLINE void interleave(Vf a, Vf b, Vf &low, Vf &high) {
#if ATEDM_ISA >= ATEDM_AVX512
  const __m512i lower = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  const __m512i upper = _mm512_setr_epi32(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
  low = (Vf)_mm512_permutex2var_ps((__m512)a, lower, (__m512)b);
  high = (Vf)_mm512_permutex2var_ps((__m512)a, upper, (__m512)b);
#elif ATEDM_ISA >= ATEDM_AVX2
  const __m256 even = _mm256_unpacklo_ps((__m256)a, (__m256)b), odd = _mm256_unpackhi_ps((__m256)a, (__m256)b);
  low = (Vf)_mm256_permute2f128_ps(even, odd, 0x20);
  high = (Vf)_mm256_permute2f128_ps(even, odd, 0x31);
#else
  low = Vf{a[0], b[0], a[1], b[1]};
  high = Vf{a[2], b[2], a[3], b[3]};
#endif
}

// out[j, i] = in[i, j], a square of kLanes by kLanes.
ATEDM_INLINE void transpose(const float *in, float *out) {
  Vf rows[kLanes], next[kLanes];
  ATEDM_UNROLL for (int i = 0; i < kLanes; ++i) rows[i] = load_as<Vf>(in + i * kTileChannels);
  // Each round interleaves the upper half of the rows with the lower half; after log2(kLanes) rounds, rows are columns.
  ATEDM_UNROLL for (int round = 1; round < kLanes; round *= 2) {
    ATEDM_UNROLL for (int i = 0; i < kLanes / 2; ++i) {
      interleave(rows[i], rows[i + kLanes / 2], next[2 * i], next[2 * i + 1]);
    }
    ATEDM_UNROLL for (int i = 0; i < kLanes; ++i) rows[i] = next[i];
  }
  ATEDM_UNROLL for (int i = 0; i < kLanes; ++i) store_as(out + i * kTileTokens, rows[i]);
}

// One channel of the residual at `count` tokens from `first`.
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

// out = residual + rows at `count` tokens from `first`, token by token, in channels-last order. rows[i] holds the
// channels of token first + i, in the dtype of x, `row_stride` elements apart.
inline void add_rows_channels_last(const atedm_feature_map &map, const char *residual, char *out, int64_t first,
                                   int64_t count, const char *const *rows, int64_t row_stride) {
  const int64_t row_step = row_stride * bytes_of(map.x_dtype);
  const int64_t residual_bytes = bytes_of(map.residual_dtype), out_bytes = bytes_of(map.out_dtype);
  alignas(64) float values[kTileChannels], line[kTileChannels];
  for (int64_t i = 0; i < count; ++i) {
    const int64_t n = first + i, y = n / map.width, x = n % map.width;
    const int64_t place = y * map.residual_stride[2] + x * map.residual_stride[3];
    for (int64_t c = 0; c < map.channels; c += kTileChannels) {
      const int64_t channels = smaller(kTileChannels, map.channels - c), at = place + c * map.residual_stride[1];
      load_row(rows[i] + c * row_step, row_stride, map.x_dtype, channels, values);
      load_row(residual + at * residual_bytes, map.residual_stride[1], map.residual_dtype, channels, line);
      for (int64_t j = 0; j < channels; ++j) line[j] += values[j];
      store_row(out + (n * map.channels + c) * out_bytes, map.out_dtype, channels, line);
    }
  }
}

// The same in contiguous order: a tile is transposed, then added channel by channel.
inline void add_rows_contiguous(const atedm_feature_map &map, const char *residual, char *out, int64_t first,
                                int64_t count, const char *const *rows, int64_t row_stride) {
  const int64_t row_step = row_stride * bytes_of(map.x_dtype);
  const int64_t residual_bytes = bytes_of(map.residual_dtype), out_bytes = bytes_of(map.out_dtype);
  // Whole squares are transposed, so the rows that no token fills must be initialised too.
  alignas(64) float values[kLanes][kTileChannels] = {}, columns[kTileChannels][kTileTokens], line[kTileTokens];
  for (int64_t c = 0; c < map.channels; c += kTileChannels) {
    const int64_t channels = smaller(kTileChannels, map.channels - c);
    for (int64_t i = 0; i < count; i += kLanes) {
      for (int64_t k = 0; k < smaller<int64_t>(kLanes, count - i); ++k) {
        load_row(rows[i + k] + c * row_step, row_stride, map.x_dtype, channels, values[k]);
      }
      for (int64_t j = 0; j < channels; j += kLanes) transpose(&values[0][j], &columns[j][i]);
    }
    for (int64_t j = 0; j < channels; ++j) {
      load_tokens(map, residual + (c + j) * map.residual_stride[1] * residual_bytes, first, count, line);
      for (int64_t i = 0; i < count; ++i) line[i] += columns[j][i];
      store_row(out + ((c + j) * map.height * map.width + first) * out_bytes, map.out_dtype, count, line);
    }
  }
}

inline void add_rows(const atedm_feature_map &map, int64_t b, int64_t first, int64_t count, const char *const *rows,
                     int64_t row_stride) {
  const int64_t image = map.channels * map.height * map.width * bytes_of(map.out_dtype);
  const int64_t residual_step = map.residual_stride[0] * bytes_of(map.residual_dtype);
  const auto add = map.channels_last ? add_rows_channels_last : add_rows_contiguous;
  add(map, static_cast<const char *>(map.residual) + b * residual_step, static_cast<char *>(map.out) + b * image, first,
      count, rows, row_stride);
}

ATEDM_INLINE bool is_empty(const atedm_feature_map &map) {
  return map.batch * map.channels * map.height * map.width == 0;
}

// Calls run(b, first, count) for every block of tokens; one thread runs a block.
template <class Run>
ATEDM_INLINE int32_t for_token_blocks(const atedm_feature_map &map, int32_t threads, const Run &run) {
  const auto known = [](int32_t dtype) { return dtype >= ATEDM_FLOAT32 && dtype <= ATEDM_FLOAT16; };
  if (!known(map.x_dtype) || !known(map.residual_dtype) || !known(map.out_dtype)) return ATEDM_INVALID;
  if (map.batch < 0 || map.channels < 0 || map.height < 0 || map.width < 0) return ATEDM_INVALID;
  if (is_empty(map)) return ATEDM_OK;
  const int64_t positions = map.height * map.width, blocks = (positions + kTileTokens - 1) / kTileTokens;
  threads = threads_for(threads, map.batch * blocks, 16 * kTileTokens * map.channels);
  parallel(threads, map.batch * blocks, [&](int32_t, int64_t item) {
    const int64_t first = item % blocks * kTileTokens;
    run(item / blocks, first, smaller(kTileTokens, positions - first));
  });
  return ATEDM_OK;
}

ATEDM_INLINE int64_t index_at(const atedm_feature_map &map, int64_t b, int64_t i) {
  return load_as<int64_t>(map.index + b * map.index_stride[0] + i * map.index_stride[1]);
}

}  // namespace ATEDM_NAMESPACE
}  // namespace atedm
