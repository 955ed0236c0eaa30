"""Recovery into a feature map: read along the channels, add the residual, write along the layout of the map."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from atedm_kernels._launch import Launch, run_all
from atedm_kernels.ops.gather_tokens.triton_kernel import load_index
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
def _recover_kernel(
    x,
    source,  # [batch, tokens]
    residual,
    out,
    slots,
    tokens,
    channels,
    width,
    x_stride_b,
    x_stride_n,
    x_stride_c,
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
):
    batch, positions, columns, inside = program_tile(tokens, channels, BLOCK_TOKENS, BLOCK_CHANNELS)
    rows = load_index(source + batch * tokens, positions, positions < tokens, slots)
    recovered = tl.load(x + batch * x_stride_b + rows[:, None] * x_stride_n + columns * x_stride_c, mask=inside)
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
    store_sum(out, batch, positions, columns, inside, before, recovered, out_stride_b, out_stride_c, out_stride_n)


def recover_launch(x: Tensor, source: Tensor, residual: Tensor, out: Tensor) -> Launch:
    """``source`` must be contiguous, ``out`` contiguous or channels-last."""
    return Launch(
        _recover_kernel,
        grid=feature_map_grid(residual),
        arguments={
            "x": x,
            "source": source,
            "slots": x.shape[1],
            "x_stride_b": x.stride(0),
            "x_stride_n": x.stride(1),
            "x_stride_c": x.stride(2),
            **feature_map_arguments(residual, out),
        },
        constants=feature_map_constants(residual),
    )


def recover_feature_map_triton(x: Tensor, source: Tensor, residual: Tensor) -> Tensor:
    """``residual[b, :, n // w, n % w] + x[b, source[b, n]]``; shapes as in the public op."""
    out = empty_feature_map(x, residual)
    run_all([recover_launch(x, source.contiguous(), residual, out)], x.device)
    return out
