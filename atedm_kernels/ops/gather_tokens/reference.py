"""Gather of rows in plain PyTorch."""

from __future__ import annotations

from torch import Tensor


def gather_rows_reference(x: Tensor, index: Tensor) -> Tensor:
    """``out[b, j] = x[b, index[b, j]]``; an index out of range is clamped, as in the kernels."""
    index = index.clamp(0, x.shape[1] - 1)
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[2]))
