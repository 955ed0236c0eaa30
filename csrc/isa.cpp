// Which instruction sets (ISAs) this CPU runs, and the choice among them.
#include "isa.h"

#include <atomic>

#if defined(__x86_64__) || defined(__i386__)
#include <cpuid.h>
#define ATEDM_X86 1
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace atedm {

// ATEDM_HAS_… is defined for the ISAs that were compiled.
#define ATEDM_DECLARE(isa)       \
  namespace isa {                \
  extern const Kernels kKernels; \
  }
ATEDM_DECLARE(portable)
ATEDM_DECLARE(avx2)
ATEDM_DECLARE(avx512)
ATEDM_DECLARE(avx512_bf16)
ATEDM_DECLARE(amx)

const Kernels *const kIsaKernels[ATEDM_ISAS] = {
    &portable::kKernels,
#if defined(ATEDM_HAS_AVX2)
    &avx2::kKernels,
#else
    nullptr,
#endif
#if defined(ATEDM_HAS_AVX512)
    &avx512::kKernels,
#else
    nullptr,
#endif
#if defined(ATEDM_HAS_AVX512_BF16)
    &avx512_bf16::kKernels,
#else
    nullptr,
#endif
#if defined(ATEDM_HAS_AMX)
    &amx::kKernels,
#else
    nullptr,
#endif
};

namespace {

constexpr const char *kNames[ATEDM_ISAS] = {"portable", "avx2", "avx512", "avx512_bf16", "amx"};

#if defined(ATEDM_X86)

bool bit(unsigned reg, int position) { return (reg >> position & 1) != 0; }

// Register state that the operating system saves when it switches threads.
uint64_t saved_state() {
  unsigned low, high;
  __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return uint64_t{high} << 32 | low;
}

bool saves(uint64_t mask) { return (saved_state() & mask) == mask; }

// Linux grants the state of the tiles only on request, and then to the whole process.
bool tiles_are_granted() {
#if defined(__linux__) && defined(SYS_arch_prctl)
  constexpr int kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

const char *find_why_not(int32_t isa) {
  constexpr uint64_t kYmm = 0x6, kZmm = 0xe6, kTiles = 0x60000;
  unsigned a, b, c, d, b7 = 0, c7 = 0, d7 = 0, a71 = 0;
  if (!__get_cpuid(1, &a, &b, &c, &d)) return "this CPU has no CPUID";
  const unsigned c1 = c;
  if (__get_cpuid_count(7, 0, &a, &b, &c, &d)) b7 = b, c7 = c, d7 = d;
  if (__get_cpuid_count(7, 1, &a, &b, &c, &d)) a71 = a;
  (void)c7;
  if (!bit(c1, 27) || !saves(kYmm)) return "the operating system does not save AVX registers";
  if (!bit(c1, 28) || !bit(b7, 5) || !bit(c1, 12) || !bit(c1, 29)) return "this CPU lacks AVX2, FMA or F16C";
  if (isa == ATEDM_AVX2) return nullptr;
  if (!bit(b7, 16) || !bit(b7, 17) || !bit(b7, 30) || !bit(b7, 31)) return "this CPU lacks AVX-512 F, DQ, BW or VL";
  if (!saves(kZmm)) return "the operating system does not save AVX-512 registers";
  if (isa == ATEDM_AVX512) return nullptr;
  if (!bit(a71, 5)) return "this CPU lacks AVX512_BF16";
  if (isa == ATEDM_AVX512_BF16) return nullptr;
  if (!bit(d7, 22) || !bit(d7, 24)) return "this CPU lacks AMX-BF16";
  if (!saves(kTiles)) return "the operating system does not save AMX tiles";
  if (!tiles_are_granted()) return "the operating system grants no AMX tiles";
  return nullptr;
}

#else

const char *find_why_not(int32_t) { return "this CPU is not x86"; }

#endif

const char *why_not(int32_t isa) {
  if (isa < 0 || isa >= ATEDM_ISAS) return "there is no such ISA";
  if (kIsaKernels[isa] == nullptr) return "this build of the library lacks it";
  return isa == ATEDM_PORTABLE ? nullptr : find_why_not(isa);
}

int32_t best_isa() {
  for (int32_t isa = ATEDM_ISAS - 1; isa > 0; --isa) {
    if (why_not(isa) == nullptr) return isa;
  }
  return ATEDM_PORTABLE;
}

std::atomic<int32_t> &current_isa() {
  static std::atomic<int32_t> isa{best_isa()};
  return isa;
}

// Chosen by measurement; see weighted_page_rank.cpp.
constexpr int64_t kFloatMapLimit = 1 << 20, kSixteenBitMapLimit = 256 << 20;
std::atomic<int64_t> float_limit{kFloatMapLimit}, sixteen_bit_limit{kSixteenBitMapLimit};

const Kernels &kernels() { return *kIsaKernels[current_isa().load()]; }

}  // namespace

double float_map_limit() { return static_cast<double>(float_limit.load()); }
double sixteen_bit_map_limit() { return static_cast<double>(sixteen_bit_limit.load()); }

}  // namespace atedm

extern "C" {

int32_t atedm_abi(void) { return ATEDM_ABI; }

const char *atedm_isa_name(int32_t isa) {
  return isa >= 0 && isa < ATEDM_ISAS ? atedm::kNames[isa] : nullptr;
}

const char *atedm_isa_why_not(int32_t isa) { return atedm::why_not(isa); }

int32_t atedm_isa(void) { return atedm::current_isa().load(); }

int32_t atedm_set_isa(int32_t isa) {
  if (atedm::why_not(isa) != nullptr) return ATEDM_INVALID;
  atedm::current_isa().store(isa);
  return ATEDM_OK;
}

void atedm_set_map_limits(int64_t float_bytes, int64_t sixteen_bit_bytes) {
  atedm::float_limit = float_bytes < 0 ? atedm::kFloatMapLimit : float_bytes;
  atedm::sixteen_bit_limit = sixteen_bit_bytes < 0 ? atedm::kSixteenBitMapLimit : sixteen_bit_bytes;
}

int32_t atedm_attention_column_sums(const atedm_map *map, const float *weights, const int64_t weights_stride[3],
                                    float *out, int32_t threads) {
  return atedm::kernels().attention_column_sums(*map, weights, weights_stride, out, threads);
}

int32_t atedm_weighted_page_rank(const atedm_map *map, int32_t max_iterations, double tolerance, const float *initial,
                                 const int64_t initial_stride[3], float *scores, int32_t *iterations,
                                 int32_t threads) {
  return atedm::kernels().weighted_page_rank(*map, max_iterations, tolerance, initial, initial_stride, scores,
                                             iterations, threads);
}

int32_t atedm_weighted_page_rank_cross(const atedm_map *map, int32_t max_iterations, double tolerance,
                                       const float *initial, const int64_t initial_stride[3], float *scores,
                                       int32_t *iterations, int32_t threads) {
  return atedm::kernels().weighted_page_rank_cross(*map, max_iterations, tolerance, initial, initial_stride, scores,
                                                   iterations, threads);
}

int32_t atedm_similarity_source(const atedm_map *map, const int64_t *index, const int64_t index_stride[2],
                                int64_t keep, int64_t *source, int32_t threads) {
  return atedm::kernels().similarity_source(*map, index, index_stride, keep, source, threads);
}

int32_t atedm_recover_feature_map(const atedm_feature_map *map, int32_t threads) {
  return atedm::kernels().recover_feature_map(*map, threads);
}

int32_t atedm_update_feature_map(const atedm_feature_map *map, void *cache, const int64_t cache_stride[3],
                                 int32_t threads) {
  return atedm::kernels().update_feature_map(*map, cache, cache_stride, threads);
}

}  // extern "C"
