"""Drift of tokens: one pass over the feature map. Each program owns a tile of tokens and runs over all channels."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from atedm_kernels._launch import Launch, cdiv, next_power_of_2, run_all
from atedm_kernels.ops.triton_feature_map import load_feature_map, map_arguments, rows_follow

# 32 tokens of a channel are two of the GPU's sectors of 32 bytes, so few that SDXL's level 3 fills half of the machine.
_BLOCK_TOKENS = 32
_BLOCK_CHANNELS = 64


@triton.jit
def _token_drift_kernel(
    x,
    projection,  # [projected, channels]
    seen,
    observed,  # [batch, projected, tokens]
    drift,  # [batch, tokens]
    tokens,
    channels,
    width,
    projected,
    x_stride_b,
    x_stride_c,
    x_stride_h,
    x_stride_n,
    seen_stride_b,
    seen_stride_w,
    seen_stride_n,
    ROWS_FOLLOW: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    BLOCK_PROJECTED: tl.constexpr,
):
    token_tiles = tl.cdiv(tokens, BLOCK_TOKENS)
    batch = (tl.program_id(0) // token_tiles).to(tl.int64)
    positions = (tl.program_id(0) % token_tiles) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    outputs = tl.arange(0, BLOCK_PROJECTED)
    is_output = outputs < projected

    total = tl.zeros([BLOCK_TOKENS, BLOCK_PROJECTED], tl.float32)
    for first in range(0, channels, BLOCK_CHANNELS):
        columns = first + tl.arange(0, BLOCK_CHANNELS)
        inside = (positions < tokens)[:, None] & (columns < channels)[None, :]
        values = load_feature_map(
            x,
            batch,
            positions,
            columns.to(tl.int64)[None, :],
            inside,
            width,
            x_stride_b,
            x_stride_c,
            x_stride_h,
            x_stride_n,
            ROWS_FOLLOW,
        )
        weights = tl.load(
            projection + outputs[None, :] * channels + columns[:, None],
            mask=is_output[None, :] & (columns < channels)[:, None],
            other=0.0,
        )
        total += tl.sum(values.to(tl.float32)[:, :, None] * weights.to(tl.float32)[None, :, :], axis=1)

    mask = (positions < tokens)[:, None] & is_output[None, :]
    rounded = total.to(observed.dtype.element_ty)
    places = positions[:, None]
    tl.store(observed + (batch * projected + outputs[None, :]) * tokens + places, rounded, mask=mask)
    seen += batch * seen_stride_b + outputs[None, :].to(tl.int64) * seen_stride_w
    before = tl.load(seen + places.to(tl.int64) * seen_stride_n, mask=mask, other=0.0)
    # Rounded as torch's subtraction is; zero where there is no output.
    moved = (rounded.to(tl.float32) - before.to(tl.float32)).to(rounded.dtype).to(tl.float32)
    tl.store(drift + batch * tokens + positions, tl.sqrt_rn(tl.sum(moved * moved, axis=1)), mask=positions < tokens)


def token_drift_launch(x: Tensor, projection: Tensor, seen: Tensor, observed: Tensor, drift: Tensor) -> Launch:
    """``projection`` and the outputs must be contiguous."""
    batch, _, tokens = observed.shape
    return Launch(
        _token_drift_kernel,
        grid=cdiv(tokens, _BLOCK_TOKENS) * batch,
        arguments={
            "projection": projection,
            "seen": seen,
            "observed": observed,
            "drift": drift,
            "projected": projection.shape[0],
            **map_arguments("x", x),
            "seen_stride_b": seen.stride(0),
            "seen_stride_w": seen.stride(1),
            "seen_stride_n": seen.stride(2),
        },
        constants={
            "ROWS_FOLLOW": rows_follow(x),
            "BLOCK_TOKENS": _BLOCK_TOKENS,
            "BLOCK_CHANNELS": _BLOCK_CHANNELS,
            "BLOCK_PROJECTED": next_power_of_2(projection.shape[0]),
        },
    )


def token_drift_triton(x: Tensor, projection: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
    """``projection @ x`` ``[B, W, N]``, and its distance from ``seen`` ``[B, 1, N]``; shapes as in the op."""
    batch, width, tokens = seen.shape
    observed = torch.empty(batch, width, tokens, dtype=seen.dtype, device=seen.device)
    drift = torch.empty(batch, 1, tokens, dtype=torch.float32, device=seen.device)
    run_all([token_drift_launch(x, projection.contiguous(), seen, observed, drift)], x.device)
    return observed, drift
