"""Top-k selection over joined heads in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor


def join_heads(scores: Tensor, reduction: str) -> Tensor:
    """``[B, H, N]`` → ``[B, N]`` float64 by root mean square (``"rms"``) or ``"mean"`` over the heads."""
    scores = scores.double()
    if reduction == "mean":
        return scores.mean(dim=1)
    # Scaled by the largest value, so that no square overflows or vanishes.
    largest = scores.abs().amax(dim=1, keepdim=True)
    ratio = torch.where(largest > 0, scores / largest, 0.0)
    return torch.where(largest.isinf(), largest, largest * ratio.square().mean(dim=1, keepdim=True).sqrt())[:, 0]


def select_tokens_reference(scores: Tensor, keep: int, reduction: str) -> Tensor:
    """The ``keep`` best tokens of each row, ascending; shapes as in the public op."""
    importance = join_heads(scores, reduction)
    importance = importance.masked_fill(importance.isnan(), float("-inf"))
    order = torch.sort(importance, dim=-1, descending=True, stable=True).indices
    return order[:, :keep].sort(dim=-1).values
