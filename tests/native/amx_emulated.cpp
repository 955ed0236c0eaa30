// Compares the kernels of the AMX ISA, on emulated tiles, with those of the portable ISA.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "isa.h"

namespace atedm {
namespace portable {
extern const Kernels kKernels;
}
namespace amx {
extern const Kernels kKernels;
}
}  // namespace atedm

namespace {

void require(bool condition, const char *what, int64_t tokens, int64_t head_dim) {
  if (condition) return;
  std::printf("%s differ at %ld tokens, head dim %ld\n", what, static_cast<long>(tokens), static_cast<long>(head_dim));
  std::exit(1);
}

bool close(const std::vector<float> &a, const std::vector<float> &b, float tolerance) {
  for (size_t i = 0; i < a.size(); ++i) {
    if (!(std::fabs(a[i] - b[i]) <= tolerance * std::fabs(b[i]))) return false;
  }
  return true;
}

void compare(int64_t tokens, int64_t head_dim) {
  const int64_t heads = 2, rows = heads * tokens;
  uint32_t seed = 7;
  const auto random_bits = [&] {  // bfloat16 of -1 to 1
    seed = seed * 1664525u + 1013904223u;
    const float value = static_cast<float>(seed >> 8) / (1 << 23) - 1;
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    return static_cast<uint16_t>(bits >> 16);
  };
  std::vector<uint16_t> q(rows * head_dim), k(rows * head_dim);
  for (auto &x : q) x = random_bits();
  for (auto &x : k) x = random_bits();
  std::vector<float> lse(rows, std::log(static_cast<float>(tokens)));
  atedm_map map{};
  map.q = q.data(), map.k = k.data(), map.lse = lse.data();
  map.batch = 1, map.heads = heads, map.queries = map.keys = tokens, map.head_dim = head_dim;
  for (int64_t *stride : {map.q_stride, map.k_stride}) {
    stride[3] = 1, stride[2] = head_dim, stride[1] = tokens * head_dim, stride[0] = heads * stride[1];
  }
  map.lse_stride[2] = 1, map.lse_stride[1] = tokens, map.lse_stride[0] = rows;
  map.scale = 0.5, map.dtype = ATEDM_BFLOAT16;

  std::vector<float> got(rows), expected(rows);
  std::vector<int32_t> iterations(heads);
  const atedm::Kernels &tiles = atedm::amx::kKernels, &plain = atedm::portable::kKernels;
  tiles.attention_column_sums(map, nullptr, nullptr, got.data(), 2);
  plain.attention_column_sums(map, nullptr, nullptr, expected.data(), 2);
  require(close(got, expected, 2e-5f), "column sums", tokens, head_dim);
  std::vector<float> initial(rows);
  for (int64_t i = 0; i < rows; ++i) initial[i] = static_cast<float>(1 + i % 5);
  for (const float *from : {static_cast<const float *>(nullptr), static_cast<const float *>(initial.data())}) {
    tiles.weighted_page_rank(map, 3, 0, from, map.lse_stride, got.data(), iterations.data(), 2);
    plain.weighted_page_rank(map, 3, 0, from, map.lse_stride, expected.data(), iterations.data(), 2);
    require(close(got, expected, 1e-4f), "scores", tokens, head_dim);
  }
  const int64_t keep = (tokens + 2) / 3, stride[2] = {keep, 1};
  std::vector<int64_t> index(keep), source(tokens), wanted(tokens);
  for (int64_t i = 0; i < keep; ++i) index[i] = 3 * i;
  tiles.similarity_source(map, index.data(), stride, keep, source.data(), 2);
  plain.similarity_source(map, index.data(), stride, keep, wanted.data(), 2);
  require(source == wanted, "sources", tokens, head_dim);
}

}  // namespace

int main() {
  for (const int64_t tokens : {1, 15, 16, 49, 97, 131, 300}) {
    for (const int64_t head_dim : {8, 13, 32, 40, 64, 80}) compare(tokens, head_dim);
  }
  std::puts("same");
}
