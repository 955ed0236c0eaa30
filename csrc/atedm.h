/* Plain C interface of the CPU kernels. No torch and no Python headers, so one build serves every version of both.
 *
 * Strides count elements. Sizes may be 0. A function returns ATEDM_OK or an error; after an error, its outputs are
 * undefined. No function keeps a lock after it returns, and only atedm_set_openmp keeps a pointer. Any number of
 * threads may call them.
 */
#ifndef ATEDM_H
#define ATEDM_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#if defined(_WIN32)
#define ATEDM_API __declspec(dllexport)
#else
#define ATEDM_API __attribute__((visibility("default")))
#endif

/* Raise it whenever a signature or a structure below changes. The Python side checks it before any other call. */
#define ATEDM_ABI 4

enum atedm_status { ATEDM_OK = 0, ATEDM_OUT_OF_MEMORY = 1, ATEDM_INVALID = 2 };
enum atedm_dtype { ATEDM_FLOAT32 = 0, ATEDM_BFLOAT16 = 1, ATEDM_FLOAT16 = 2 };
enum atedm_reduction { ATEDM_RMS = 0, ATEDM_MEAN = 1 };

/* The attention map A_ij = exp(scale * q_i . k_j - lse_i) of every batch row and head, which is never stored. */
typedef struct atedm_map {
  const void *q;    /* [batch, heads, queries, head_dim] */
  const void *k;    /* [batch, heads, keys, head_dim] */
  const float *lse; /* [batch, heads, queries], natural log */
  int64_t batch, heads, queries, keys, head_dim;
  int64_t q_stride[4], k_stride[4], lse_stride[3];
  double scale;
  int32_t dtype; /* of q and k */
} atedm_map;

ATEDM_API int32_t atedm_abi(void);

/* Instruction sets (ISAs), from 0, the slowest; NULL past the last. */
ATEDM_API const char *atedm_isa_name(int32_t isa);
/* NULL if this CPU and its operating system can run the ISA, else the reason. */
ATEDM_API const char *atedm_isa_why_not(int32_t isa);
/* The active ISA of the process: the fastest one that runs, until another is set. */
ATEDM_API int32_t atedm_isa(void);
ATEDM_API int32_t atedm_set_isa(int32_t isa);

/* GOMP_parallel of the OpenMP runtime that runs the caller's threads, or NULL to let the library start its own. Sharing
 * one team keeps two sets of threads from competing for the cores. */
ATEDM_API void atedm_set_openmp(void (*gomp_parallel)(void (*)(void *), void *, unsigned, unsigned));

/* out [batch, heads, keys], contiguous: sum over i of weights_i A_ij; NULL weights stand for 1 / queries. */
ATEDM_API int32_t atedm_attention_column_sums(const atedm_map *map, const float *weights,
                                              const int64_t weights_stride[3], float *out, int32_t threads);

/* atedm_weighted_page_rank keeps one head's map in float32 up to float_bytes, else in 16 bits up to sixteen_bit_bytes;
 * beyond both, each iteration recomputes it. atedm_weighted_page_rank_cross keeps it in float32 up to
 * sixteen_bit_bytes. A negative number restores the default. */
ATEDM_API void atedm_set_map_limits(int64_t float_bytes, int64_t sixteen_bit_bytes);

/* scores [batch, heads, queries], iterations [batch, heads], contiguous; queries must equal keys. initial [batch,
 * heads, queries], not negative, is normalised; NULL stands for uniform scores. */
ATEDM_API int32_t atedm_weighted_page_rank(const atedm_map *map, int32_t max_iterations, double tolerance,
                                           const float *initial, const int64_t initial_stride[3], float *scores,
                                           int32_t *iterations, int32_t threads);

/* scores [batch, heads, queries], iterations [batch, heads], contiguous; initial as above. */
ATEDM_API int32_t atedm_weighted_page_rank_cross(const atedm_map *map, int32_t max_iterations, double tolerance,
                                                 const float *initial, const int64_t initial_stride[3], float *scores,
                                                 int32_t *iterations, int32_t threads);

/* source [batch, queries], contiguous: a kept token's own slot, else the slot with the largest sum over the heads of
 * A[index[slot], token]; index [batch, keep], clamped to valid tokens. */
ATEDM_API int32_t atedm_similarity_source(const atedm_map *map, const int64_t *index, const int64_t index_stride[2],
                                          int64_t keep, int64_t *source, int32_t threads);

/* out [batch, keep], contiguous, ascending; keep from 0 to tokens. NaN ranks lowest. */
ATEDM_API int32_t atedm_select_tokens(const float *scores, const int64_t scores_stride[3], int64_t batch,
                                      int64_t heads, int64_t tokens, int64_t keep, int32_t reduction, int64_t *out,
                                      int32_t threads);

/* out [batch, rows, channels], contiguous: x[b, index[b, r]], with the index clamped; x [batch, length, channels], of
 * elements of 2 or 4 bytes. */
ATEDM_API int32_t atedm_gather_rows(const void *x, const int64_t x_stride[3], int64_t batch, int64_t length,
                                    int64_t channels, int32_t element_bytes, const int64_t *index,
                                    const int64_t index_stride[2], int64_t rows, void *out, int32_t threads);

/* residual and out [batch, channels, height, width]; x [batch, slots, channels]; index as each function below needs it.
 * out is contiguous, in channels-last order if channels_last is not 0. */
typedef struct atedm_feature_map {
  const void *x, *residual;
  const int64_t *index;
  void *out;
  int64_t batch, slots, channels, height, width;
  int64_t x_stride[3], index_stride[2], residual_stride[4];
  int32_t x_dtype, residual_dtype, out_dtype, channels_last;
} atedm_feature_map;

/* out: residual + x[b, index[b, n]]; index [batch, height * width], a slot for each position, clamped. */
ATEDM_API int32_t atedm_recover_feature_map(const atedm_feature_map *map, int32_t threads);

/* cache[b, index[b, s]] = x[b, s], then out: residual + cache; index [batch, slots], the token of each slot, ascending.
 * cache [batch, height * width, channels] has x's dtype and shares no memory with x or residual. The last slot counts
 * for a token named twice; a token out of range is skipped. */
ATEDM_API int32_t atedm_update_feature_map(const atedm_feature_map *map, void *cache, const int64_t cache_stride[3],
                                           int32_t threads);

#ifdef __cplusplus
}
#endif

#endif
