"""Tiles of a feature map ``[B, C, h, w]``, tokens by channels, for the kernels that read one."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from atedm_kernels._launch import cdiv

_BLOCK_TOKENS = 64
_BLOCK_CHANNELS = 64


@triton.jit
def program_tile(tokens, channels, BLOCK_TOKENS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr):
    """This program's batch row, positions ``[tokens]`` and channels ``[1, channels]``, and which elements exist."""
    channel_tiles = tl.cdiv(channels, BLOCK_CHANNELS)
    token_tiles = tl.cdiv(tokens, BLOCK_TOKENS)
    program = tl.program_id(0)
    batch = (program // channel_tiles // token_tiles).to(tl.int64)
    positions = (program // channel_tiles % token_tiles) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    columns = (program % channel_tiles) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    inside = (positions < tokens)[:, None] & (columns < channels)[None, :]
    return batch, positions, columns.to(tl.int64)[None, :], inside


@triton.jit
def load_feature_map(
    x,
    batch,
    positions,
    columns,
    inside,
    width,
    stride_b,
    stride_c,
    stride_h,
    stride_n,  # from token to token if rows follow one another, else within a row
    ROWS_FOLLOW: tl.constexpr,
):
    positions = positions.to(tl.int64)
    place = positions * stride_n
    if not ROWS_FOLLOW:
        place = (positions // width) * stride_h + (positions % width) * stride_n
    x += batch * stride_b
    return tl.load(x + place[:, None] + columns * stride_c, mask=inside, other=0.0)


@triton.jit
def store_sum(out, batch, positions, columns, inside, residual, tokens, stride_b, stride_c, stride_n):
    """Store ``residual + tokens``, rounded once, as torch's own addition does."""
    value = (residual.to(tl.float32) + tokens.to(tl.float32)).to(out.dtype.element_ty)
    out += batch * stride_b
    tl.store(out + positions.to(tl.int64)[:, None] * stride_n + columns * stride_c, value, mask=inside)


def _token_stride(x: Tensor) -> int | None:
    """Stride from one position of ``[B, C, h, w]`` to the next, across rows; None if rows do not follow one another."""
    _, _, height, width = x.shape
    _, _, stride_h, stride_w = x.stride()
    if width == 1:  # the stride of a dimension of size 1 means nothing
        return stride_h
    return stride_w if height == 1 or stride_h == width * stride_w else None


def feature_map_grid(residual: Tensor) -> int:
    batch, channels, height, width = residual.shape
    return cdiv(channels, _BLOCK_CHANNELS) * cdiv(height * width, _BLOCK_TOKENS) * batch


def rows_follow(x: Tensor) -> bool:
    """Whether one stride leads from each token of ``x`` ``[B, C, h, w]`` to the next, across its rows."""
    return _token_stride(x) is not None


def map_arguments(name: str, x: Tensor) -> dict[str, object]:
    """``x`` ``[B, C, h, w]``, its sizes and its strides, with ``name`` before those."""
    _, channels, height, width = x.shape
    token_stride = _token_stride(x)
    return {
        name: x,
        "tokens": height * width,
        "channels": channels,
        "width": width,
        f"{name}_stride_b": x.stride(0),
        f"{name}_stride_c": x.stride(1),
        f"{name}_stride_h": x.stride(2),
        f"{name}_stride_n": x.stride(3) if token_stride is None else token_stride,
    }


def feature_map_arguments(residual: Tensor, out: Tensor) -> dict[str, object]:
    """Both tensors, the sizes and the strides; ``out`` must be contiguous or channels-last."""
    return {
        **map_arguments("residual", residual),
        "out": out,
        "out_stride_b": out.stride(0),
        "out_stride_c": out.stride(1),
        "out_stride_n": _token_stride(out),
    }


def feature_map_constants(residual: Tensor) -> dict[str, object]:
    return {
        "ROWS_FOLLOW": rows_follow(residual),
        "BLOCK_TOKENS": _BLOCK_TOKENS,
        "BLOCK_CHANNELS": _BLOCK_CHANNELS,
    }
