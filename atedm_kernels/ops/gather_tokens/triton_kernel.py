"""Gather of rows: a tile of rows by channels per program."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from atedm_kernels._launch import Launch, cdiv, next_power_of_2, run_all

BLOCK_ROWS = 16
_BLOCK_CHANNELS = 128


@triton.jit
def load_index(index, offsets, mask, length):
    """Rows that ``index`` names, clamped to ``[0, length)``."""
    rows = tl.load(index + offsets, mask=mask, other=0)
    return tl.minimum(tl.maximum(rows, 0), length - 1)


@triton.jit
def gather_tile(
    x,
    index,  # [batch, rows]
    out,  # [batch, rows, channels]
    tile,
    length,
    rows,
    channels,
    stride_b,
    stride_n,
    stride_c,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    channel_tiles = tl.cdiv(channels, BLOCK_CHANNELS)
    row_tiles = tl.cdiv(rows, BLOCK_ROWS)
    batch = (tile // channel_tiles // row_tiles).to(tl.int64)
    slots = (tile // channel_tiles % row_tiles) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    columns = (tile % channel_tiles) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)

    source = load_index(index + batch * rows, slots, slots < rows, length)
    inside = (slots < rows)[:, None] & (columns < channels)[None, :]
    columns = columns.to(tl.int64)[None, :]
    value = tl.load(x + batch * stride_b + source[:, None] * stride_n + columns * stride_c, mask=inside)
    tl.store(out + (batch * rows + slots)[:, None] * channels + columns, value, mask=inside)


@triton.jit
def _gather_kernel(
    x,
    index,  # [batch, rows]
    x_out,  # [batch, rows, channels]
    length,
    rows,
    x_channels,
    x_stride_b,
    x_stride_n,
    x_stride_c,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    tile = tl.program_id(0)
    gather_tile(
        x, index, x_out, tile, length, rows, x_channels, x_stride_b, x_stride_n, x_stride_c, BLOCK_ROWS, BLOCK_CHANNELS
    )


def block_of_channels(channels: int) -> int:
    return min(_BLOCK_CHANNELS, max(16, next_power_of_2(channels)))


def gather_tiles(out: Tensor, block_channels: int) -> int:
    """The number of tiles of ``out`` ``[B, K, C]``, one for each program."""
    batch, rows, channels = out.shape
    return cdiv(channels, block_channels) * cdiv(rows, BLOCK_ROWS) * batch


def gather_arguments(name: str, x: Tensor, out: Tensor) -> dict[str, object]:
    """``x`` and ``out``, the channels and the strides of ``x``, with ``name`` before each."""
    return {
        name: x,
        f"{name}_out": out,
        f"{name}_channels": x.shape[2],
        f"{name}_stride_b": x.stride(0),
        f"{name}_stride_n": x.stride(1),
        f"{name}_stride_c": x.stride(2),
    }


def gather_launch(x: Tensor, index: Tensor, out: Tensor) -> Launch:
    """``index`` and ``out`` must be contiguous."""
    block_channels = block_of_channels(x.shape[2])
    return Launch(
        _gather_kernel,
        grid=gather_tiles(out, block_channels),
        arguments={
            "index": index,
            "length": x.shape[1],
            "rows": out.shape[1],
            **gather_arguments("x", x, out),
        },
        constants={"BLOCK_ROWS": BLOCK_ROWS, "BLOCK_CHANNELS": block_channels},
    )


def gather_rows_triton(x: Tensor, index: Tensor) -> Tensor:
    """``out[b, j] = x[b, index[b, j]]``, contiguous."""
    out = torch.empty(x.shape[0], index.shape[1], x.shape[2], dtype=x.dtype, device=x.device)
    run_all([gather_launch(x, index.contiguous(), out)], x.device)
    return out
