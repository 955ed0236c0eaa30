"""Sums of rows: a program adds up the rows of one slot, block after block. No atomics, so the order is fixed."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from atedm_kernels._launch import Launch, cdiv, next_power_of_2, run_all
from atedm_kernels.ops.sum_rows.reference import runs_of_slots

# Most slots have one row, a few have hundreds.
_BLOCK_ROWS = 16
_BLOCK_CHANNELS = 128


@triton.jit
def _sum_rows_kernel(
    x,  # [batch, positions, channels]
    order,  # [batch, positions]
    begins,  # [batch, slots + 1]
    out,  # [batch, slots, channels]
    positions,
    slots,
    channels,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    channel_tiles = tl.cdiv(channels, BLOCK_CHANNELS)
    program = tl.program_id(0)
    batch = (program // channel_tiles // slots).to(tl.int64)
    slot = program // channel_tiles % slots
    columns = (program % channel_tiles) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    is_channel = columns < channels

    begin = tl.load(begins + batch * (slots + 1) + slot)
    end = tl.load(begins + batch * (slots + 1) + slot + 1)
    total = tl.zeros([BLOCK_CHANNELS], tl.float32)
    for first in range(begin, end, BLOCK_ROWS):
        places = first + tl.arange(0, BLOCK_ROWS)
        rows = tl.load(order + batch * positions + places, mask=places < end, other=0)
        inside = (places < end)[:, None] & is_channel[None, :]
        value = tl.load(x + (batch * positions + rows)[:, None] * channels + columns[None, :], mask=inside, other=0.0)
        total += tl.sum(value.to(tl.float32), axis=0)
    tl.store(out + (batch * slots + slot) * channels + columns, total.to(out.dtype.element_ty), mask=is_channel)


def sum_rows_launch(x: Tensor, order: Tensor, begins: Tensor, out: Tensor) -> Launch:
    """All tensors must be contiguous."""
    batch, slots, channels = out.shape
    block_channels = min(_BLOCK_CHANNELS, max(16, next_power_of_2(channels)))
    return Launch(
        _sum_rows_kernel,
        grid=cdiv(channels, block_channels) * slots * batch,
        arguments={
            "x": x,
            "order": order,
            "begins": begins,
            "out": out,
            "positions": x.shape[1],
            "slots": slots,
            "channels": channels,
        },
        constants={"BLOCK_ROWS": _BLOCK_ROWS, "BLOCK_CHANNELS": block_channels},
    )


def sum_rows_triton(x: Tensor, source: Tensor, slots: int) -> Tensor:
    """``out[b, s] = Σ x[b, i]`` over the positions ``i`` with ``source[b, i] = s``, contiguous."""
    order, begins = runs_of_slots(source, slots)
    out = torch.empty(x.shape[0], slots, x.shape[2], dtype=x.dtype, device=x.device)
    run_all([sum_rows_launch(x.contiguous(), order, begins, out)], x.device)
    return out
