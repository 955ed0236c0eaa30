"""Recovery into a feature map: read along the channels, add the residual, write along the layout of the map."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from atedm_kernels._launch import Launch, cdiv, run_all
from atedm_kernels.ops.gather_tokens.triton_kernel import load_index
from atedm_kernels.ops.recover_feature_map.reference import empty_feature_map

_BLOCK_TOKENS = 64
_BLOCK_CHANNELS = 64


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
    residual_stride_n,  # from token to token if rows follow one another, else within a row
    out_stride_b,
    out_stride_c,
    out_stride_n,
    ROWS_FOLLOW: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    channel_tiles = tl.cdiv(channels, BLOCK_CHANNELS)
    token_tiles = tl.cdiv(tokens, BLOCK_TOKENS)
    program = tl.program_id(0)
    batch = (program // channel_tiles // token_tiles).to(tl.int64)
    positions = (program // channel_tiles % token_tiles) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    columns = (program % channel_tiles) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    inside = (positions < tokens)[:, None] & (columns < channels)[None, :]

    rows = load_index(source + batch * tokens, positions, positions < tokens, slots)
    columns = columns.to(tl.int64)[None, :]
    recovered = tl.load(x + batch * x_stride_b + rows[:, None] * x_stride_n + columns * x_stride_c, mask=inside)

    positions = positions.to(tl.int64)
    if ROWS_FOLLOW:
        place = positions * residual_stride_n
    else:
        place = (positions // width) * residual_stride_h + (positions % width) * residual_stride_n
    residual += batch * residual_stride_b
    kept = tl.load(residual + place[:, None] + columns * residual_stride_c, mask=inside)
    # Round once, as torch's own addition does.
    value = (kept.to(tl.float32) + recovered.to(tl.float32)).to(out.dtype.element_ty)
    out += batch * out_stride_b
    tl.store(out + positions[:, None] * out_stride_n + columns * out_stride_c, value, mask=inside)


def _token_stride(x: Tensor) -> int | None:
    """Elements from one position of ``[B, C, h, w]`` to the next, row after row; None if rows lie apart."""
    _, _, height, width = x.shape
    _, _, stride_h, stride_w = x.stride()
    if width == 1:  # the stride of a dimension of size 1 means nothing
        return stride_h
    return stride_w if height == 1 or stride_h == width * stride_w else None


def recover_launch(x: Tensor, source: Tensor, residual: Tensor, out: Tensor) -> Launch:
    """``source`` must be contiguous, ``out`` contiguous or channels-last."""
    batch, channels, height, width = residual.shape
    token_stride = _token_stride(residual)
    return Launch(
        _recover_kernel,
        grid=cdiv(channels, _BLOCK_CHANNELS) * cdiv(height * width, _BLOCK_TOKENS) * batch,
        arguments={
            "x": x,
            "source": source,
            "residual": residual,
            "out": out,
            "slots": x.shape[1],
            "tokens": height * width,
            "channels": channels,
            "width": width,
            "x_stride_b": x.stride(0),
            "x_stride_n": x.stride(1),
            "x_stride_c": x.stride(2),
            "residual_stride_b": residual.stride(0),
            "residual_stride_c": residual.stride(1),
            "residual_stride_h": residual.stride(2),
            "residual_stride_n": residual.stride(3) if token_stride is None else token_stride,
            "out_stride_b": out.stride(0),
            "out_stride_c": out.stride(1),
            "out_stride_n": _token_stride(out),
        },
        constants={
            "ROWS_FOLLOW": token_stride is not None,
            "BLOCK_TOKENS": _BLOCK_TOKENS,
            "BLOCK_CHANNELS": _BLOCK_CHANNELS,
        },
    )


def recover_feature_map_triton(x: Tensor, source: Tensor, residual: Tensor) -> Tensor:
    """``residual[b, :, n // w, n % w] + x[b, source[b, n]]``; shapes as in the public op."""
    out = empty_feature_map(x, residual)
    run_all([recover_launch(x, source.contiguous(), residual, out)], x.device)
    return out
