"""Sums of rows in plain PyTorch, and a search for the rows of each slot, which the Triton kernel uses too."""

from __future__ import annotations

import torch
from torch import Tensor

from atedm_kernels.ops.gather_tokens.reference import gather_rows_reference


def runs_of_slots(source: Tensor, slots: int) -> tuple[Tensor, Tensor]:
    """Sort positions by their slot, so that the positions of a slot form one run.

    Args:
        source: int64 ``[B, N]``; a slot out of range is clamped.

    Returns:
        The sorted positions, int64 ``[B, N]``, ascending within each slot; and where the run of each slot begins,
        followed by where the last one ends, int64 ``[B, slots + 1]``.
    """
    sorted_slots, order = source.clamp(0, slots - 1).contiguous().sort(dim=1, stable=True)
    bounds = torch.arange(slots + 1, device=source.device).repeat(source.shape[0], 1)
    return order, torch.searchsorted(sorted_slots, bounds)


def sum_rows_reference(x: Tensor, source: Tensor, slots: int) -> Tensor:
    """``out[b, s] = Σ x[b, i]`` over the positions ``i`` with ``source[b, i] = s``, in ascending order."""
    order, begins = runs_of_slots(source, slots)
    rows = gather_rows_reference(x, order).to(torch.promote_types(x.dtype, torch.float32))
    return torch.segment_reduce(rows, "sum", offsets=begins, axis=1, unsafe=True).to(x.dtype)
