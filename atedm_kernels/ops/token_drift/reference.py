"""Drift of tokens in plain PyTorch."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def token_drift_reference(x: Tensor, projection: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
    """``projection @ x`` ``[B, W, N]``, and its distance from ``seen`` ``[B, 1, N]``; shapes as in the op."""
    observed = F.conv2d(x.to(projection.dtype), projection[:, :, None, None]).flatten(2).contiguous()
    moved = (observed - seen).float()
    return observed, moved.square().sum(1, keepdim=True).sqrt()
