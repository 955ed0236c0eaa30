// Logits q_i . k_j of some queries and a panel of keys: the product that every op over the attention map builds on.
//
// Keys are stored in panels, transposed, so that a vector holds one coordinate of several keys. Queries are broadcast.
// A column of the map then stays in its lane, and sums over rows need no shuffle. Logits pass through a buffer in the
// first-level cache. Exponentials straight from the registers of each tile were slower: their latency showed after
// every tile.
#pragma once

#include "rows.h"

namespace atedm {
namespace ATEDM_NAMESPACE {

constexpr int kPanel = kVectors * kLanes;             // keys of a panel
constexpr int64_t kBlockKeys = 256;                   // keys that a work item holds while queries pass by
constexpr int64_t kBlockPanels = kBlockKeys / kPanel;
constexpr int64_t kMaxHeadDim = 256;
constexpr int64_t kBlockRows = 48;                    // queries at a time: they and their logits fit into L1 too

template <int kRows>
ATEDM_INLINE void store_tile(const Vf (&sums)[kRows][kVectors], float *out) {
  ATEDM_UNROLL for (int r = 0; r < kRows; ++r) {
    ATEDM_UNROLL for (int v = 0; v < kVectors; ++v) store_as(out + r * kPanel + v * kLanes, sums[r][v]);
  }
}

// float32 products. fp16 is widened when loaded, and so is bf16 on an ISA without an instruction for it.
struct FloatDot {
  using Unit = float;
  static constexpr int kRows = 6;
  static int64_t depth(int64_t head_dim) { return head_dim; }
  static void load(const char *row, int64_t stride, int32_t dtype, int64_t head_dim, Unit *out) {
    load_row(row, stride, dtype, head_dim, out);
  }
  static ATEDM_INLINE void tile(const Unit *q, const Unit *panel, int64_t depth, float *out) {
    Vf sums[kRows][kVectors];
    ATEDM_UNROLL for (int r = 0; r < kRows; ++r) ATEDM_UNROLL for (int v = 0; v < kVectors; ++v) sums[r][v] = Vf{};
    for (int64_t d = 0; d < depth; ++d, panel += kPanel) {
      Vf key[kVectors];
      ATEDM_UNROLL for (int v = 0; v < kVectors; ++v) key[v] = load_as<Vf>(panel + v * kLanes);
      ATEDM_UNROLL for (int r = 0; r < kRows; ++r) {
        const Vf query = splat(q[r * depth + d]);
        ATEDM_UNROLL for (int v = 0; v < kVectors; ++v) sums[r][v] += query * key[v];
      }
    }
    store_tile(sums, out);
  }
};

#if ATEDM_ISA >= ATEDM_AVX512_BF16
// Pairs of bfloat16: two products per lane and instruction. Products are exact, sums float32, denormal inputs 0.
struct PairDot {
  using Unit = uint32_t;
#if ATEDM_ISA >= ATEDM_AMX
  // Tested only on emulated tiles. A tile holds 16 queries. Panels have the layout that the tile unit needs for its
  // second operand.
  static constexpr int kRows = 16;
  static int64_t depth(int64_t head_dim) { return round_up(head_dim, 32) / 2; }
  static ATEDM_INLINE void tile(const Unit *q, const Unit *panel, int64_t depth, float *out) {
    static_assert(kVectors == 4, "tiles 0 to 3 are sums, 4 to 6 operands");
    // Separate statements: GCC's intrinsics are macros.
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t d = 0; d < depth; d += 16, panel += 16 * kPanel) {
      _tile_loadd(4, q + d, static_cast<size_t>(depth) * 4);
      _tile_loadd(5, panel, kPanel * 4);
      _tile_loadd(6, panel + 16, kPanel * 4);
      _tile_dpbf16ps(0, 4, 5);
      _tile_dpbf16ps(1, 4, 6);
      _tile_loadd(5, panel + 32, kPanel * 4);
      _tile_loadd(6, panel + 48, kPanel * 4);
      _tile_dpbf16ps(2, 4, 5);
      _tile_dpbf16ps(3, 4, 6);
    }
    _tile_stored(0, out, kPanel * 4);
    _tile_stored(1, out + 1 * kLanes, kPanel * 4);
    _tile_stored(2, out + 2 * kLanes, kPanel * 4);
    _tile_stored(3, out + 3 * kLanes, kPanel * 4);
  }
#else
  static constexpr int kRows = 6;
  static int64_t depth(int64_t head_dim) { return (head_dim + 1) / 2; }
  static ATEDM_INLINE void tile(const Unit *q, const Unit *panel, int64_t depth, float *out) {
    Vf sums[kRows][kVectors];
    ATEDM_UNROLL for (int r = 0; r < kRows; ++r) ATEDM_UNROLL for (int v = 0; v < kVectors; ++v) sums[r][v] = Vf{};
    for (int64_t d = 0; d < depth; ++d, panel += kPanel) {
      Vu key[kVectors];
      ATEDM_UNROLL for (int v = 0; v < kVectors; ++v) key[v] = load_as<Vu>(panel + v * kLanes);
      ATEDM_UNROLL for (int r = 0; r < kRows; ++r) {
        const Vu query = splat(q[r * depth + d]);
        ATEDM_UNROLL for (int v = 0; v < kVectors; ++v) {
          sums[r][v] = (Vf)_mm512_dpbf16_ps((__m512)sums[r][v], (__m512bh)query, (__m512bh)key[v]);
        }
      }
    }
    store_tile(sums, out);
  }
#endif
  static void load(const char *row, int64_t stride, int32_t, int64_t head_dim, Unit *out) {
    load_pairs(row, stride, head_dim, depth(head_dim), out);
  }
};
#endif

// Configures the thread's tile unit for as long as the object lives.
struct TileUnit {
#if ATEDM_ISA >= ATEDM_AMX
  TileUnit() {
    alignas(64) uint8_t config[64] = {1};  // palette 1
    for (int tile = 0; tile < 8; ++tile) config[16 + 2 * tile] = 64, config[48 + tile] = 16;
    _tile_loadconfig(config);
  }
  ~TileUnit() { _tile_release(); }
#else
  TileUnit() {}
#endif
};

// Loads the keys key_at(0) … key_at(keys - 1) of a head as panels. Columns past the last key hold copies of it, because
// they must not bring in values that no key has.
template <class Dot, class KeyAt>
inline void load_panels(const char *k, const int64_t (&stride)[4], int32_t dtype, int64_t head_dim, int64_t keys,
                        const KeyAt &key_at, typename Dot::Unit *panels) {
  const int64_t depth = Dot::depth(head_dim), element = bytes_of(dtype);
  typename Dot::Unit row[kMaxHeadDim];
  for (int64_t j = 0; j < round_up(keys, kPanel); ++j) {
    Dot::load(k + key_at(smaller(j, keys - 1)) * stride[2] * element, stride[3], dtype, head_dim, row);
    typename Dot::Unit *column = panels + j / kPanel * kPanel * depth + j % kPanel;
    for (int64_t d = 0; d < depth; ++d) column[d * kPanel] = row[d];
  }
}

// out[r, j] = q_r . k_j for `rows` queries by one panel, rows rounded up to whole tiles.
template <class Dot>
inline void panel_logits(const typename Dot::Unit *queries, int64_t rows, const typename Dot::Unit *panel,
                         int64_t depth, float *out) {
  static_assert(kBlockRows % Dot::kRows == 0, "whole tiles");
  for (int64_t row = 0; row < rows; row += Dot::kRows) {
    Dot::tile(queries + row * depth, panel, depth, out + row * kPanel);
  }
}

// Calls run(Dot{}) with the fastest product for the dtype on this ISA.
template <class Run>
ATEDM_INLINE int32_t with_dot([[maybe_unused]] int32_t dtype, Run &&run) {
#if ATEDM_ISA >= ATEDM_AVX512_BF16
  if (dtype == ATEDM_BFLOAT16) return run(PairDot{});
#endif
  return run(FloatDot{});
}

// Number of threads worth starting for `items` items of `products` multiplications each: one per 0.1 ms of work or so.
ATEDM_INLINE int32_t threads_for(int32_t threads, int64_t items, int64_t products) {
  const int64_t worth = items * larger<int64_t>(products, 1) / 4000000 + 1;
  return static_cast<int32_t>(larger<int64_t>(1, smaller<int64_t>(smaller<int64_t>(threads, items), worth)));
}

template <class Body>
ATEDM_INLINE void parallel(int32_t threads, int64_t items, const Body &body) {
  run_parallel(
      threads, items,
      [](void *context, int32_t worker, int64_t item) { (*static_cast<const Body *>(context))(worker, item); },
      const_cast<Body *>(&body));
}

// One block of memory, divided into aligned parts.
class Scratch {
 public:
  // Add all parts, then allocate: add() returns an offset, at() its address.
  int64_t add(int64_t bytes) {
    const int64_t offset = size_;
    size_ = round_up(size_ + bytes, 64);
    return offset;
  }
  bool allocate() { return (memory_ = static_cast<char *>(atedm::allocate(static_cast<size_t>(size_)))) != nullptr; }
  template <class T>
  T *at(int64_t offset) const {
    return reinterpret_cast<T *>(memory_ + offset);
  }
  Scratch() = default;
  Scratch(const Scratch &) = delete;
  ~Scratch() { release(memory_); }

 private:
  int64_t size_ = 0;
  char *memory_ = nullptr;
};

}  // namespace ATEDM_NAMESPACE
}  // namespace atedm
