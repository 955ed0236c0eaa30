// Rows of any dtype and stride, as float32 or as pairs of bfloat16.
#pragma once

#include "simd.h"

namespace atedm {
namespace ATEDM_NAMESPACE {

ATEDM_INLINE int64_t bytes_of(int32_t dtype) { return dtype == ATEDM_FLOAT32 ? 4 : 2; }

ATEDM_INLINE float float_of_bfloat16(uint16_t x) { return bits_as<float>(static_cast<uint32_t>(x) << 16); }

ATEDM_INLINE uint16_t bfloat16_of_float(float x) {
  const uint32_t bits = bits_as<uint32_t>(x);
  if (x != x) return static_cast<uint16_t>(bits >> 16 | 0x40);  // rounding could carry a NaN into infinity
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

ATEDM_INLINE float float_of_float16(uint16_t x) {
  const uint32_t sign = static_cast<uint32_t>(x & 0x8000) << 16, magnitude = x & 0x7fff;
  // A product moves the exponent from bias 15 to 127, and also makes denormals normal.
  const float value = magnitude >= 0x7c00 ? bits_as<float>(0x7f800000u | magnitude << 13)
                                          : bits_as<float>(magnitude << 13) * 0x1p112f;
  return bits_as<float>(bits_as<uint32_t>(value) | sign);
}

ATEDM_INLINE uint16_t float16_of_float(float x) {
  const uint32_t bits = bits_as<uint32_t>(x), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return static_cast<uint16_t>(sign | 0x7e00);
  if (magnitude >= 0x477ff000) return static_cast<uint16_t>(sign | 0x7c00);  // 65520 and above round to infinity
  if (magnitude < 0x38800000) {  // denormal: adding 0.5 leaves units of 2^-24, rounded to nearest even
    const float shifted = bits_as<float>(magnitude) + 0.5f;
    return static_cast<uint16_t>(sign | (bits_as<uint32_t>(shifted) - 0x3f000000));
  }
  return static_cast<uint16_t>(sign | ((magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13));
}

ATEDM_INLINE float load_element(const char *address, int32_t dtype) {
  if (dtype == ATEDM_FLOAT32) return load_as<float>(address);
  const uint16_t bits = load_as<uint16_t>(address);
  return dtype == ATEDM_BFLOAT16 ? float_of_bfloat16(bits) : float_of_float16(bits);
}

// `count` elements, `stride` elements apart, as float32.
ATEDM_INLINE void load_row(const char *row, int64_t stride, int32_t dtype, int64_t count, float *out) {
  const int64_t step = stride * bytes_of(dtype);
  int64_t i = 0;
  if (stride == 1) {
    if (dtype == ATEDM_FLOAT32) {
      __builtin_memcpy(out, row, static_cast<size_t>(count) * 4);
      return;
    }
    if (dtype == ATEDM_BFLOAT16) {
      for (; i < count; ++i) out[i] = float_of_bfloat16(load_as<uint16_t>(row + 2 * i));
      return;
    }
#if ATEDM_ISA >= ATEDM_AVX512
    for (; i + 16 <= count; i += 16) store_as(out + i, _mm512_cvtph_ps(load_as<__m256i>(row + 2 * i)));
#elif ATEDM_ISA >= ATEDM_AVX2
    for (; i + 8 <= count; i += 8) store_as(out + i, _mm256_cvtph_ps(load_as<__m128i>(row + 2 * i)));
#endif
  }
  for (; i < count; ++i) out[i] = load_element(row + i * step, dtype);
}

ATEDM_INLINE void store_row(char *row, int32_t dtype, int64_t count, const float *values) {
  int64_t i = 0;
  if (dtype == ATEDM_FLOAT32) {
    __builtin_memcpy(row, values, static_cast<size_t>(count) * 4);
    return;
  }
  if (dtype == ATEDM_BFLOAT16) {
    for (; i < count; ++i) store_as(row + 2 * i, bfloat16_of_float(values[i]));
    return;
  }
#if ATEDM_ISA >= ATEDM_AVX512
  for (; i + 16 <= count; i += 16) {
    store_as(row + 2 * i, _mm512_cvtps_ph(load_as<__m512>(values + i), _MM_FROUND_TO_NEAREST_INT));
  }
#elif ATEDM_ISA >= ATEDM_AVX2
  for (; i + 8 <= count; i += 8) {
    store_as(row + 2 * i, _mm256_cvtps_ph(load_as<__m256>(values + i), _MM_FROUND_TO_NEAREST_INT));
  }
#endif
  for (; i < count; ++i) store_as(row + 2 * i, float16_of_float(values[i]));
}

// A row of `count` bfloat16 as `pairs` pairs, with zeros past its end.
ATEDM_INLINE void load_pairs(const char *row, int64_t stride, int64_t count, int64_t pairs, uint32_t *out) {
  int64_t i = 0;
  if (stride == 1) {
    constexpr int64_t kStep = 16;  // a copy of fixed size needs no call
    for (; i + kStep <= count / 2; i += kStep) __builtin_memcpy(out + i, row + 4 * i, 4 * kStep);
    for (; i < count / 2; ++i) out[i] = load_as<uint32_t>(row + 4 * i);
  }
  for (; i < pairs; ++i) {
    const int64_t d = 2 * i;
    const uint32_t low = d < count ? load_as<uint16_t>(row + d * stride * 2) : 0;
    const uint32_t high = d + 1 < count ? load_as<uint16_t>(row + (d + 1) * stride * 2) : 0;
    out[i] = low | high << 16;
  }
}

}  // namespace ATEDM_NAMESPACE
}  // namespace atedm
