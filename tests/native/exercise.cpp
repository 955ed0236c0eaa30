// Runs every function of the C interface with every ISA of this CPU, over awkward sizes, strides and values, for the
// sanitizers to watch. Buffers are exactly as large as they must be and start at odd addresses. Prints the number of
// calls; aborts on a wrong result.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <vector>

#include "atedm.h"

namespace {

long calls = 0;

#define CHECK(condition)                                                                \
  do {                                                                                  \
    if (!(condition)) std::printf("line %d: %s\n", __LINE__, #condition), std::abort(); \
  } while (0)

void must(int32_t status) {
  ++calls;
  CHECK(status == ATEDM_OK);
}

uint32_t seed = 1;
float random_number() {
  seed = seed * 1664525u + 1013904223u;
  return static_cast<float>(seed >> 8) / (1 << 24) * 2 - 1;
}

// Memory of exactly `bytes`, at an address that is odd if `offset` is.
struct Bytes {
  Bytes(int64_t bytes, int64_t offset) : memory(static_cast<char *>(std::malloc(bytes + offset))), data(memory + offset) {
    std::memset(memory, 0, bytes + offset);
  }
  ~Bytes() { std::free(memory); }
  Bytes(const Bytes &) = delete;
  char *memory, *data;
};

int64_t size_of(int32_t dtype) { return dtype == ATEDM_FLOAT32 ? 4 : 2; }

void write(char *to, int32_t dtype, float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  const uint16_t bfloat16 = static_cast<uint16_t>(bits >> 16);
  // Near enough for a test: normal numbers of fp16's range, digits cut off; everything else 0, infinite or NaN.
  const int32_t exponent = static_cast<int32_t>(bits >> 23 & 255) - 112;
  const uint32_t magnitude = std::isnan(value) ? 0x7e00 : exponent >= 31 ? 0x7c00 : exponent <= 0 ? 0
                             : static_cast<uint32_t>(exponent) << 10 | (bits >> 13 & 0x3ff);
  const uint16_t float16 = static_cast<uint16_t>(bits >> 16 & 0x8000 | magnitude);
  if (dtype == ATEDM_FLOAT32) std::memcpy(to, &value, 4);
  if (dtype == ATEDM_BFLOAT16) std::memcpy(to, &bfloat16, 2);
  if (dtype == ATEDM_FLOAT16) std::memcpy(to, &float16, 2);
}

struct Problem {
  int64_t batch, heads, queries, keys, head_dim;
  int32_t dtype;
  int64_t step;  // stride of the last dimension
  float special;
};

void rank_and_prune(const Problem &p, int32_t threads) {
  const int64_t rows = p.batch * p.heads * p.queries, columns = p.batch * p.heads * p.keys;
  const auto bytes = [&](int64_t count) { return count == 0 ? 0 : ((count * p.head_dim - 1) * p.step + 1) * size_of(p.dtype); };
  Bytes q(bytes(rows), 1), k(bytes(columns), 3), lse(rows * 4, 1);
  for (int64_t i = 0; i < rows * p.head_dim; ++i) write(q.data + i * p.step * size_of(p.dtype), p.dtype, random_number());
  for (int64_t i = 0; i < columns * p.head_dim; ++i) write(k.data + i * p.step * size_of(p.dtype), p.dtype, random_number());
  const bool is_special = p.special != 0;
  if (is_special && rows * p.head_dim > 0) write(q.data, p.dtype, p.special);
  if (is_special && columns * p.head_dim > 0) write(k.data + bytes(columns) - size_of(p.dtype), p.dtype, p.special);
  for (int64_t i = 0; i < rows; ++i) write(lse.data + i * 4, ATEDM_FLOAT32, std::log(static_cast<float>(p.keys)));

  atedm_map map{};
  map.q = q.data, map.k = k.data, map.lse = reinterpret_cast<const float *>(lse.data);
  map.batch = p.batch, map.heads = p.heads, map.queries = p.queries, map.keys = p.keys, map.head_dim = p.head_dim;
  const auto strides = [&](int64_t *out, int64_t tokens) {
    out[3] = p.step, out[2] = p.head_dim * p.step, out[1] = tokens * out[2], out[0] = p.heads * out[1];
  };
  strides(map.q_stride, p.queries), strides(map.k_stride, p.keys);
  map.lse_stride[2] = 1, map.lse_stride[1] = p.queries, map.lse_stride[0] = p.heads * p.queries;
  map.scale = 0.3, map.dtype = p.dtype;

  std::vector<float> sums(columns), scores(rows), alone(rows), weights(rows, 0.5f);
  std::vector<int32_t> iterations(p.batch * p.heads);
  const float *const starts[] = {nullptr, weights.data()};
  must(atedm_attention_column_sums(&map, nullptr, nullptr, sums.data(), threads));
  must(atedm_attention_column_sums(&map, weights.data(), map.lse_stride, sums.data(), threads));
  for (const int64_t kept : {int64_t{1} << 40, int64_t{0}}) {
    atedm_set_map_limits(kept, kept);
    for (const float *initial : starts) {
      const int32_t status = atedm_weighted_page_rank_cross(&map, 3, 1e-3, initial, map.lse_stride, scores.data(),
                                                            iterations.data(), threads);
      ++calls;
      CHECK(status == (p.keys == 0 && rows > 0 ? ATEDM_INVALID : ATEDM_OK));
    }
  }
  const auto rank = [&](const float *initial, std::vector<float> &out, int32_t with) {
    return atedm_weighted_page_rank(&map, 3, 0, initial, map.lse_stride, out.data(), iterations.data(), with);
  };
  if (p.queries != p.keys) {
    CHECK(rank(nullptr, scores, threads) == ATEDM_INVALID);
    atedm_set_map_limits(-1, -1);
    return;
  }
  for (const int route : {0, 1, 2}) {
    atedm_set_map_limits(route == 0 ? int64_t{1} << 40 : 0, route == 1 ? int64_t{1} << 40 : 0);
    for (const float *initial : starts) {
      must(rank(initial, alone, 1));
      must(rank(initial, scores, threads));
      CHECK(rows == 0 || std::memcmp(alone.data(), scores.data(), rows * 4) == 0);
      for (int64_t head = 0; !is_special && p.queries > 0 && head < p.batch * p.heads; ++head) {
        double total = 0;
        for (int64_t i = 0; i < p.queries; ++i) total += scores[head * p.queries + i];
        CHECK(std::fabs(total - 1) < 1e-4 && iterations[head] == 3);
      }
    }
  }
  atedm_set_map_limits(-1, -1);

  for (const int64_t keep : {int64_t{1}, (p.queries + 2) / 3, p.queries}) {
    if (keep > p.queries) continue;
    std::vector<int64_t> index(p.batch * keep), source(p.batch * p.queries);
    for (const int32_t reduction : {ATEDM_RMS, ATEDM_MEAN}) {
      must(atedm_select_tokens(scores.data(), map.lse_stride, p.batch, p.heads, p.queries, keep, reduction, index.data(),
                               threads));
    }
    for (int64_t i = 0; i < p.batch * keep; ++i) {
      CHECK(index[i] >= 0 && index[i] < p.queries && (i % keep == 0 || index[i] > index[i - 1]));
    }
    const int64_t index_stride[2] = {keep, 1};
    const int32_t status = atedm_similarity_source(&map, index.data(), index_stride, keep, source.data(), threads);
    ++calls;
    CHECK(status == (keep == 0 && p.batch * p.queries > 0 ? ATEDM_INVALID : ATEDM_OK));
    for (int64_t i = 0; status == ATEDM_OK && i < p.batch * p.queries; ++i) CHECK(source[i] >= 0 && source[i] < keep);
  }
}

// Writes some rows of x into a cache whose elements are `step` apart: ascending tokens, of which the first and the last
// may be out of range, then wild ones.
void update(atedm_feature_map map, int64_t step, int32_t threads) {
  const int64_t positions = map.height * map.width, bytes = size_of(map.x_dtype), x_step = map.x_stride[2];
  map.slots = map.slots < positions ? map.slots : positions;
  const int64_t elements = map.batch * positions * map.channels, row = map.channels * step;
  Bytes cache(elements == 0 ? 0 : ((elements - 1) * step + 1) * bytes, 1);
  const int64_t cache_stride[3] = {positions * row, row, step};
  std::vector<int64_t> index(map.batch * map.slots);
  map.index = index.data(), map.index_stride[0] = map.slots, map.index_stride[1] = 1;
  for (int64_t i = 0; i < map.batch * map.slots; ++i) index[i] = (i % map.slots + 1) * (positions + 1) / map.slots - 1;
  must(atedm_update_feature_map(&map, cache.data, cache_stride, threads));
  for (int64_t i = 0; map.channels > 0 && i < map.batch * map.slots; ++i) {
    if (index[i] < 0 || index[i] >= positions) continue;
    const int64_t b = i / map.slots, c = map.channels - 1;
    const int64_t from = b * map.x_stride[0] + i % map.slots * map.x_stride[1] + c * x_step;
    const int64_t to = b * cache_stride[0] + index[i] * row + c * step;
    CHECK(std::memcmp(static_cast<const char *>(map.x) + from * bytes, cache.data + to * bytes, bytes) == 0);
  }
  for (auto &i : index) i = static_cast<int64_t>(random_number() * 1e3f * static_cast<float>(positions));
  must(atedm_update_feature_map(&map, cache.data, cache_stride, threads));
}

void copy(int64_t batch, int64_t length, int64_t channels, int64_t height, int64_t width, int32_t threads) {
  const int64_t positions = height * width;
  std::vector<int64_t> index(batch * positions);
  for (auto &i : index) i = static_cast<int64_t>(random_number() * 1e6f * static_cast<float>(length));  // wild ones too
  const int64_t index_stride[2] = {positions, 1};
  for (const int32_t dtype : {ATEDM_FLOAT32, ATEDM_BFLOAT16, ATEDM_FLOAT16}) {
    for (const int64_t step : {1, 2}) {
      const int64_t elements = batch * length * channels, row = channels * step;
      Bytes x(elements == 0 ? 0 : ((elements - 1) * step + 1) * size_of(dtype), 1);
      for (int64_t i = 0; i < elements; ++i) write(x.data + i * step * size_of(dtype), dtype, random_number());
      Bytes out(batch * positions * channels * size_of(dtype), 0), residual(batch * positions * channels * 4, 3);
      const int64_t x_stride[3] = {length * row, row, step};
      must(atedm_gather_rows(x.data, x_stride, batch, length, channels, static_cast<int32_t>(size_of(dtype)), index.data(),
                             index_stride, positions, out.data, threads));
      for (const int32_t channels_last : {0, 1}) {
        for (const int32_t residual_dtype : {int32_t{ATEDM_FLOAT32}, int32_t{dtype}}) {
          const bool is_wide = dtype == ATEDM_FLOAT32 || residual_dtype == ATEDM_FLOAT32;
          Bytes sum(batch * positions * channels * (is_wide ? 4 : 2), 0);
          atedm_feature_map map{};
          map.x = x.data, map.residual = residual.data, map.index = index.data(), map.out = sum.data;
          map.batch = batch, map.slots = length, map.channels = channels, map.height = height, map.width = width;
          std::memcpy(map.x_stride, x_stride, sizeof(x_stride));
          std::memcpy(map.index_stride, index_stride, sizeof(index_stride));
          const int64_t wide[4] = {channels * positions, positions, width, 1};
          const int64_t last[4] = {channels * positions, 1, width * channels, channels};
          std::memcpy(map.residual_stride, channels_last ? last : wide, sizeof(wide));
          map.x_dtype = dtype, map.residual_dtype = residual_dtype, map.out_dtype = is_wide ? ATEDM_FLOAT32 : dtype;
          map.channels_last = channels_last;
          must(atedm_recover_feature_map(&map, threads));
          update(map, step, threads);
        }
      }
    }
  }
}

}  // namespace

int main() {
  const float inf = INFINITY, nan = NAN;
  for (int32_t isa = 0; atedm_isa_name(isa) != nullptr; ++isa) {
    if (atedm_isa_why_not(isa) != nullptr) continue;
    CHECK(atedm_set_isa(isa) == ATEDM_OK && atedm_isa() == isa);
    for (const int32_t dtype : {ATEDM_FLOAT32, ATEDM_BFLOAT16, ATEDM_FLOAT16}) {
      for (const Problem &p : {
               Problem{1, 1, 1, 1, 8, dtype, 1, 0}, Problem{2, 3, 67, 67, 40, dtype, 1, 0},
               Problem{1, 2, 97, 97, 13, dtype, 2, 0}, Problem{1, 1, 49, 49, 256, dtype, 1, 0},
               Problem{1, 2, 131, 77, 64, dtype, 1, 0}, Problem{2, 1, 5, 300, 160, dtype, 3, 0},
               Problem{1, 1, 50, 50, 16, dtype, 1, inf}, Problem{1, 1, 50, 50, 17, dtype, 1, -inf},
               Problem{1, 2, 65, 65, 80, dtype, 1, nan}, Problem{1, 1, 64, 64, 64, dtype, 1, 3e38f},
               Problem{0, 2, 5, 5, 8, dtype, 1, 0}, Problem{1, 0, 5, 5, 8, dtype, 1, 0},
               Problem{1, 2, 0, 0, 8, dtype, 1, 0}, Problem{1, 2, 0, 7, 8, dtype, 1, 0},
               Problem{1, 2, 7, 0, 8, dtype, 1, 0}, Problem{1, 2, 9, 9, 0, dtype, 1, 0},
           }) {
        rank_and_prune(p, 1);
        rank_and_prune(p, 3);
      }
    }
    // Large enough for several threads.
    rank_and_prune({1, 3, 331, 331, 64, ATEDM_BFLOAT16, 1, 0}, 3);
    for (const int32_t threads : {1, 3}) {
      copy(1, 1, 1, 1, 1, threads);
      copy(2, 5, 70, 5, 13, threads);
      copy(1, 9, 65, 67, 1, threads);
      copy(1, 40, 70, 13, 11, threads);
      copy(1, 30, 640, 9, 9, threads);
      copy(0, 3, 4, 2, 2, threads);
      copy(1, 3, 0, 2, 2, threads);
      copy(1, 3, 4, 0, 2, threads);
    }
  }
  const int64_t none[3] = {0, 0, 0};
  CHECK(atedm_gather_rows(nullptr, none, 1, 0, 4, 2, nullptr, none, 3, nullptr, 1) == ATEDM_INVALID);
  CHECK(atedm_gather_rows(nullptr, none, 1, 1, 4, 8, nullptr, none, 3, nullptr, 1) == ATEDM_INVALID);
  CHECK(atedm_select_tokens(nullptr, none, 1, 1, 3, 4, ATEDM_RMS, nullptr, 1) == ATEDM_INVALID);
  CHECK(atedm_set_isa(-1) == ATEDM_INVALID && atedm_set_isa(99) == ATEDM_INVALID);
  std::printf("%ld calls\n", calls);
}
