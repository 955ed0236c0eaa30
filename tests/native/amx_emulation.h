// The AMX intrinsics that csrc/ uses, after Intel's manual, in plain C++: for tests on machines without AMX.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>

namespace amx_emulation {

struct Unit {
  bool configured = false;
  uint8_t rows[8] = {};
  uint16_t row_bytes[8] = {};
  uint8_t data[8][16][64] = {};
};
inline thread_local Unit unit;

inline void require(bool condition) {
  if (!condition) std::abort();
}

inline void load_config(const void *memory) {
  const auto *bytes = static_cast<const uint8_t *>(memory);
  require(bytes[0] == 1 && bytes[1] == 0);
  unit = Unit();
  unit.configured = true;
  for (int tile = 0; tile < 8; ++tile) {
    std::memcpy(&unit.row_bytes[tile], bytes + 16 + 2 * tile, 2);
    unit.rows[tile] = bytes[48 + tile];
    require(unit.rows[tile] <= 16 && unit.row_bytes[tile] <= 64);
  }
}

inline void load(int tile, const void *base, size_t stride) {
  require(unit.configured);
  for (int r = 0; r < unit.rows[tile]; ++r) {
    std::memcpy(unit.data[tile][r], static_cast<const char *>(base) + r * stride, unit.row_bytes[tile]);
  }
}

inline void store(int tile, void *base, size_t stride) {
  require(unit.configured);
  for (int r = 0; r < unit.rows[tile]; ++r) {
    std::memcpy(static_cast<char *>(base) + r * stride, unit.data[tile][r], unit.row_bytes[tile]);
  }
}

inline float widened(const uint8_t *element) {
  uint16_t half;
  std::memcpy(&half, element, 2);
  const uint32_t bits = uint32_t{half} << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

// c[m, n] += sum over k and both of a pair: a[m, 2k + i] * b[k, 2n + i]
inline void multiply(int c, int a, int b) {
  require(unit.configured && unit.row_bytes[a] / 4 == unit.rows[b]);
  for (int m = 0; m < unit.rows[c]; ++m) {
    for (int n = 0; n < unit.row_bytes[c] / 4; ++n) {
      float sum;
      std::memcpy(&sum, &unit.data[c][m][4 * n], 4);
      for (int k = 0; k < unit.rows[b]; ++k) {
        for (int i = 0; i < 2; ++i) {
          sum += widened(&unit.data[a][m][4 * k + 2 * i]) * widened(&unit.data[b][k][4 * n + 2 * i]);
        }
      }
      std::memcpy(&unit.data[c][m][4 * n], &sum, 4);
    }
  }
}

}  // namespace amx_emulation

#undef _tile_loadconfig
#undef _tile_release
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#define _tile_loadconfig(config) amx_emulation::load_config(config)
#define _tile_release() (amx_emulation::unit.configured = false)
#define _tile_zero(tile) std::memset(amx_emulation::unit.data[tile], 0, sizeof(amx_emulation::unit.data[tile]))
#define _tile_loadd(tile, base, stride) amx_emulation::load(tile, base, stride)
#define _tile_stored(tile, base, stride) amx_emulation::store(tile, base, stride)
#define _tile_dpbf16ps(c, a, b) amx_emulation::multiply(c, a, b)
