"""Gather of rows: a tile of rows by channels per program."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from atedm_kernels._launch import Launch, cdiv, next_power_of_2, run_all

_BLOCK_ROWS = 16
_BLOCK_CHANNELS = 128


@triton.jit
def load_index(index, offsets, mask, length):
    """Rows that ``index`` names, clamped to ``[0, length)``."""
    rows = tl.load(index + offsets, mask=mask, other=0)
    return tl.minimum(tl.maximum(rows, 0), length - 1)


@triton.jit
def _gather_kernel(
    x,
    index,  # [batch, rows]
    out,  # [batch, rows, channels]
    length,
    rows,
    channels,
    x_stride_b,
    x_stride_n,
    x_stride_c,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    channel_tiles = tl.cdiv(channels, BLOCK_CHANNELS)
    row_tiles = tl.cdiv(rows, BLOCK_ROWS)
    program = tl.program_id(0)
    batch = (program // channel_tiles // row_tiles).to(tl.int64)
    slots = (program // channel_tiles % row_tiles) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    columns = (program % channel_tiles) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)

    source = load_index(index + batch * rows, slots, slots < rows, length)
    inside = (slots < rows)[:, None] & (columns < channels)[None, :]
    columns = columns.to(tl.int64)[None, :]
    value = tl.load(x + batch * x_stride_b + source[:, None] * x_stride_n + columns * x_stride_c, mask=inside)
    tl.store(out + (batch * rows + slots)[:, None] * channels + columns, value, mask=inside)


def gather_launch(x: Tensor, index: Tensor, out: Tensor) -> Launch:
    """``index`` and ``out`` must be contiguous."""
    batch, rows, channels = out.shape
    block_channels = min(_BLOCK_CHANNELS, max(16, next_power_of_2(channels)))
    return Launch(
        _gather_kernel,
        grid=cdiv(channels, block_channels) * cdiv(rows, _BLOCK_ROWS) * batch,
        arguments={
            "x": x,
            "index": index,
            "out": out,
            "length": x.shape[1],
            "rows": rows,
            "channels": channels,
            "x_stride_b": x.stride(0),
            "x_stride_n": x.stride(1),
            "x_stride_c": x.stride(2),
        },
        constants={"BLOCK_ROWS": _BLOCK_ROWS, "BLOCK_CHANNELS": block_channels},
    )


def gather_rows_triton(x: Tensor, index: Tensor) -> Tensor:
    """``out[b, j] = x[b, index[b, j]]``, contiguous."""
    out = torch.empty(x.shape[0], index.shape[1], x.shape[2], dtype=x.dtype, device=x.device)
    run_all([gather_launch(x, index.contiguous(), out)], x.device)
    return out
