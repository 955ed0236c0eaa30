"""Drift of tokens in plain PyTorch."""

from __future__ import annotations

from torch import Tensor


def distance(observed: Tensor, seen: Tensor) -> Tensor:
    """``‖observed − seen‖₂`` of each token, float32 ``[B, 1, N]``, of two ``[B, W, N]``."""
    return (observed - seen).float().square().sum(1, keepdim=True).sqrt()


def token_drift_reference(x: Tensor, projection: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
    """``projection @ x`` ``[B, W, N]``, and its distance from ``seen`` ``[B, 1, N]``; shapes as in the op."""
    # No convolution: cuDNN rounds float32 to TF32, unless it is told not to.
    observed = projection @ x.to(projection.dtype).flatten(2)
    return observed, distance(observed, seen)
