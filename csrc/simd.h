// Vectors of one ISA. This header is compiled once for each ISA, and everything in it is in that ISA's namespace.
// Neither it nor a file that includes it may use the standard library's templates: the linker keeps one copy of those
// for all ISAs, and that copy could contain instructions that this CPU lacks.
#pragma once

#include <cstddef>
#include <cstdint>

#include "isa.h"
#include "parallel.h"

#if ATEDM_ISA >= ATEDM_AVX2
#include <immintrin.h>
#endif
#if defined(ATEDM_EMULATED_TILES)  // a test's stand-in for AMX
#include ATEDM_EMULATED_TILES
#endif

#define ATEDM_INLINE inline __attribute__((always_inline))
#if defined(__clang__)
#define ATEDM_UNROLL _Pragma("clang loop unroll(full)")
#else
#define ATEDM_UNROLL _Pragma("GCC unroll 16")
#endif

namespace atedm {
namespace ATEDM_NAMESPACE {

#if ATEDM_ISA >= ATEDM_AVX512
constexpr int kLanes = 16;
constexpr int kVectors = 4;  // of keys, in a tile of 6 queries: 24 sums, 4 keys and a query fit into 32 registers
#elif ATEDM_ISA >= ATEDM_AVX2
constexpr int kLanes = 8;
constexpr int kVectors = 2;
#else
constexpr int kLanes = 4;
constexpr int kVectors = 2;
#endif

typedef float Vf __attribute__((vector_size(kLanes * 4)));
typedef uint32_t Vu __attribute__((vector_size(kLanes * 4)));

template <class T>
ATEDM_INLINE T load_as(const void *address) {
  T value;
  __builtin_memcpy(&value, address, sizeof(T));
  return value;
}
template <class T>
ATEDM_INLINE void store_as(void *address, T value) {
  __builtin_memcpy(address, &value, sizeof(T));
}
template <class To, class From>
ATEDM_INLINE To bits_as(From value) {
  static_assert(sizeof(To) == sizeof(From), "same size");
  To result;
  __builtin_memcpy(&result, &value, sizeof(To));
  return result;
}

ATEDM_INLINE Vf splat(float x) { return x - Vf{}; }  // compilers drop x - 0, but not x + 0: that turns -0 into 0
ATEDM_INLINE Vu splat(uint32_t x) { return Vu{} + x; }

template <class T>
ATEDM_INLINE T smaller(T a, T b) {
  return b < a ? b : a;
}
template <class T>
ATEDM_INLINE T larger(T a, T b) {
  return b > a ? b : a;
}
ATEDM_INLINE int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// The larger of the two; `b` if either is NaN.
ATEDM_INLINE Vf max_or_second(Vf a, Vf b) {
#if ATEDM_ISA >= ATEDM_AVX512
  return (Vf)_mm512_max_ps((__m512)a, (__m512)b);
#elif ATEDM_ISA >= ATEDM_AVX2
  return (Vf)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return a > b ? a : b;
#endif
}
ATEDM_INLINE Vf min_or_second(Vf a, Vf b) {
#if ATEDM_ISA >= ATEDM_AVX512
  return (Vf)_mm512_min_ps((__m512)a, (__m512)b);
#elif ATEDM_ISA >= ATEDM_AVX2
  return (Vf)_mm256_min_ps((__m256)a, (__m256)b);
#else
  return a < b ? a : b;
#endif
}

// x <- 2^x, relative error at most 2.7e-6 (a polynomial of degree 4 on [-1/2, 1/2], relative minimax, its mean error
// shifted to 0) plus 3e-7 of rounding. Below 2^-126 the result is 0 or a denormal, above 2^128 infinite; NaN stays NaN.
// Several vectors advance together, so that none waits for its own last result.
template <int kCount>
ATEDM_INLINE void exp2(Vf (&x)[kCount]) {
  constexpr float c0 = 0.999999247f, c1 = 0.693121805f, c2 = 0.240247445f, c3 = 0.0559178597f, c4 = 0.00957010179f;
  Vf whole[kCount], p[kCount];
#if ATEDM_ISA >= ATEDM_AVX512
  constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  ATEDM_UNROLL for (int i = 0; i < kCount; ++i) whole[i] = (Vf)_mm512_roundscale_ps((__m512)x[i], kNearest);
  ATEDM_UNROLL for (int i = 0; i < kCount; ++i) x[i] = x[i] - whole[i];
#else
  // Adding 1.5 * 2^23 rounds to a whole number, which is then in the low bits. 127 is the bias of the exponent.
  constexpr float kShift = 12582912.0f + 127.0f;
  // Clamped to the range where both factors of the result are normal numbers; at its ends the second is 0 or infinite.
  ATEDM_UNROLL for (int i = 0; i < kCount; ++i) x[i] = max_or_second(splat(-127.0f), x[i]);
  ATEDM_UNROLL for (int i = 0; i < kCount; ++i) x[i] = min_or_second(splat(128.0f), x[i]);
  ATEDM_UNROLL for (int i = 0; i < kCount; ++i) whole[i] = x[i] + splat(kShift);
  ATEDM_UNROLL for (int i = 0; i < kCount; ++i) x[i] = x[i] - (whole[i] - splat(kShift));
#endif
  ATEDM_UNROLL for (int i = 0; i < kCount; ++i) p[i] = splat(c4) * x[i] + splat(c3);
  ATEDM_UNROLL for (int i = 0; i < kCount; ++i) p[i] = p[i] * x[i] + splat(c2);
  ATEDM_UNROLL for (int i = 0; i < kCount; ++i) p[i] = p[i] * x[i] + splat(c1);
  ATEDM_UNROLL for (int i = 0; i < kCount; ++i) p[i] = p[i] * x[i] + splat(c0);
#if ATEDM_ISA >= ATEDM_AVX512
  // scalef handles the ends of the range: it defines NaN * 2^-inf as 0 and NaN * 2^inf as inf, for infinite x.
  ATEDM_UNROLL for (int i = 0; i < kCount; ++i) x[i] = (Vf)_mm512_scalef_ps((__m512)p[i], (__m512)whole[i]);
#else
  ATEDM_UNROLL for (int i = 0; i < kCount; ++i) x[i] = p[i] * bits_as<Vf>(bits_as<Vu>(whole[i]) << 23);
#endif
}

constexpr float kLog2E = 1.44269504088896341f;

}  // namespace ATEDM_NAMESPACE
}  // namespace atedm
