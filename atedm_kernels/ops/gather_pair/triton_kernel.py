"""Gather of rows of two tensors: the first programs take the tiles of the one, the others those of the other."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from atedm_kernels._launch import Launch, run_all
from atedm_kernels.ops.gather_tokens.triton_kernel import (
    BLOCK_ROWS,
    block_of_channels,
    gather_arguments,
    gather_tile,
    gather_tiles,
)


@triton.jit
def _gather_pair_kernel(
    x,
    y,
    index,  # [batch, rows]
    x_out,  # [batch, rows, x_channels]
    y_out,  # [batch, rows, y_channels]
    length,
    rows,
    x_tiles,
    x_channels,
    x_stride_b,
    x_stride_n,
    x_stride_c,
    y_channels,
    y_stride_b,
    y_stride_n,
    y_stride_c,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    tile = tl.program_id(0)
    if tile < x_tiles:
        gather_tile(
            x,
            index,
            x_out,
            tile,
            length,
            rows,
            x_channels,
            x_stride_b,
            x_stride_n,
            x_stride_c,
            BLOCK_ROWS,
            BLOCK_CHANNELS,
        )
    else:
        tile -= x_tiles
        gather_tile(
            y,
            index,
            y_out,
            tile,
            length,
            rows,
            y_channels,
            y_stride_b,
            y_stride_n,
            y_stride_c,
            BLOCK_ROWS,
            BLOCK_CHANNELS,
        )


def gather_pair_launch(x: Tensor, y: Tensor, index: Tensor, x_out: Tensor, y_out: Tensor) -> Launch:
    """``index`` and the outputs must be contiguous."""
    block_channels = block_of_channels(max(x.shape[2], y.shape[2]))
    x_tiles, y_tiles = (gather_tiles(out, block_channels) for out in (x_out, y_out))
    return Launch(
        _gather_pair_kernel,
        grid=x_tiles + y_tiles,
        arguments={
            "index": index,
            "length": x.shape[1],
            "rows": index.shape[1],
            "x_tiles": x_tiles,
            **gather_arguments("x", x, x_out),
            **gather_arguments("y", y, y_out),
        },
        constants={"BLOCK_ROWS": BLOCK_ROWS, "BLOCK_CHANNELS": block_channels},
    )


def gather_pair_triton(x: Tensor, y: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """``x[b, index[b, j]]`` and ``y[b, index[b, j]]``, contiguous."""
    outs = [torch.empty(*index.shape, one.shape[2], dtype=one.dtype, device=one.device) for one in (x, y)]
    run_all([gather_pair_launch(x, y, index.contiguous(), *outs)], x.device)
    return outs[0], outs[1]
