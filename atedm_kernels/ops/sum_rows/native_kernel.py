"""Sums of rows by torch's own CPU kernel, which adds one row after another, in the order of the positions."""

from __future__ import annotations

import torch
from torch import Tensor


def sum_rows_native(x: Tensor, source: Tensor, slots: int) -> Tensor:
    """``out[b, s] = Σ x[b, i]`` over the positions ``i`` with ``source[b, i] = s``; a slot out of range is clamped."""
    batch, _, channels = x.shape
    rows = source.clamp(0, slots - 1) + slots * torch.arange(batch)[:, None]
    sums = torch.zeros(batch * slots, channels, dtype=torch.float32)
    sums.index_add_(0, rows.flatten(), x.reshape(-1, channels).float())
    return sums.to(x.dtype).view(batch, slots, channels)
