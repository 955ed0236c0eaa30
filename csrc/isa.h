// The instruction sets (ISAs), and the kernels compiled once for each of them.
#pragma once

#include "atedm.h"

// Slowest first. Machines without AMX test its code on emulated tiles.
#define ATEDM_PORTABLE 0
#define ATEDM_AVX2 1
#define ATEDM_AVX512 2
#define ATEDM_AVX512_BF16 3
#define ATEDM_AMX 4
#define ATEDM_ISAS 5

namespace atedm {

struct Kernels {
  int32_t (*attention_column_sums)(const atedm_map &, const float *, const int64_t *, float *, int32_t);
  int32_t (*weighted_page_rank)(const atedm_map &, int32_t, double, const float *, const int64_t *, float *, int32_t *, int32_t);
  int32_t (*weighted_page_rank_cross)(const atedm_map &, int32_t, double, const float *, const int64_t *, float *, int32_t *, int32_t);
  int32_t (*similarity_source)(const atedm_map &, const int64_t *, const int64_t *, int64_t, int64_t *, int32_t);
  int32_t (*recover_feature_map)(const atedm_feature_map &, int32_t);
  int32_t (*update_feature_map)(const atedm_feature_map &, void *, const int64_t *, int32_t);
};

// The largest map of one head that is kept, in bytes; see atedm_set_map_limits.
double float_map_limit();
double sixteen_bit_map_limit();

// NULL for an ISA that this build lacks.
extern const Kernels *const kIsaKernels[ATEDM_ISAS];

}  // namespace atedm
