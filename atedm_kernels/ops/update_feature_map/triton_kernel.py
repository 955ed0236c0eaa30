"""Update of cached tokens and their feature map: each program owns a tile of the cache and of the output.

A token finds its slot by a binary search in the ascending index, some ten loads that hit the GPU's caches. A map from
tokens to slots would need a separate launch to write it.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from atedm_kernels._launch import Launch, run_all
from atedm_kernels.ops.recover_feature_map.reference import empty_feature_map
from atedm_kernels.ops.triton_feature_map import (
    feature_map_arguments,
    feature_map_constants,
    feature_map_grid,
    load_feature_map,
    program_tile,
    store_sum,
)


@triton.jit
def _find_slots(index, positions, slots, HALVINGS: tl.constexpr):
    """For each position, the last slot that names it and True; any slot and False if none does.

    ``index`` ascends. ``HALVINGS`` is log2 of ``slots``, rounded up: Triton 3.6 fails on ``while size > 1`` if ``size``
    is 1 from the start.
    """
    slot = tl.zeros_like(positions)
    size = tl.zeros([], tl.int32) + slots
    for _ in tl.static_range(HALVINGS):
        half = size // 2
        slot = tl.where(tl.load(index + slot + half) <= positions, slot + half, slot)
        size -= half
    return slot, tl.load(index + slot) == positions


@triton.jit
def _update_kernel(
    x,
    index,  # [batch, slots], ascending
    cache,
    residual,
    out,
    slots,
    tokens,
    channels,
    width,
    x_stride_b,
    x_stride_n,
    x_stride_c,
    cache_stride_b,
    cache_stride_n,
    cache_stride_c,
    residual_stride_b,
    residual_stride_c,
    residual_stride_h,
    residual_stride_n,
    out_stride_b,
    out_stride_c,
    out_stride_n,
    ROWS_FOLLOW: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    HALVINGS: tl.constexpr,
):
    batch, positions, columns, inside = program_tile(tokens, channels, BLOCK_TOKENS, BLOCK_CHANNELS)
    # Loaded before the search, because the loads of the search wait for one another.
    before = load_feature_map(
        residual,
        batch,
        positions,
        columns,
        inside,
        width,
        residual_stride_b,
        residual_stride_c,
        residual_stride_h,
        residual_stride_n,
        ROWS_FOLLOW,
    )
    slot, is_kept = _find_slots(index + batch * slots, positions, slots, HALVINGS)
    is_new = is_kept[:, None] & inside
    is_old = inside & (is_kept[:, None] == 0)

    rows = slot.to(tl.int64)[:, None]
    new = tl.load(x + batch * x_stride_b + rows * x_stride_n + columns * x_stride_c, mask=is_new)
    rows = positions.to(tl.int64)[:, None]
    cache += batch * cache_stride_b + rows * cache_stride_n + columns * cache_stride_c
    old = tl.load(cache, mask=is_old)
    tl.store(cache, new, mask=is_new)
    updated = tl.where(is_new, new, old)
    store_sum(out, batch, positions, columns, inside, before, updated, out_stride_b, out_stride_c, out_stride_n)


def update_launch(x: Tensor, index: Tensor, cache: Tensor, residual: Tensor, out: Tensor) -> Launch:
    """``index`` must be contiguous, ``out`` contiguous or channels-last."""
    return Launch(
        _update_kernel,
        grid=feature_map_grid(residual),
        arguments={
            "x": x,
            "index": index,
            "cache": cache,
            "slots": x.shape[1],
            "x_stride_b": x.stride(0),
            "x_stride_n": x.stride(1),
            "x_stride_c": x.stride(2),
            "cache_stride_b": cache.stride(0),
            "cache_stride_n": cache.stride(1),
            "cache_stride_c": cache.stride(2),
            **feature_map_arguments(residual, out),
        },
        constants={**feature_map_constants(residual), "HALVINGS": (x.shape[1] - 1).bit_length()},
    )


def update_feature_map_triton(x: Tensor, index: Tensor, cache: Tensor, residual: Tensor) -> Tensor:
    """Write ``x`` into ``cache``, then ``residual[b, :, n // w, n % w] + cache[b, n]``; shapes as in the public op."""
    out = empty_feature_map(x, residual)
    run_all([update_launch(x, index.contiguous(), cache, residual, out)], x.device)
    return out
