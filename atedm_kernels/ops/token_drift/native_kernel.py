"""Drift of tokens on a CPU: torch's own convolution projects them, in either memory format without a copy."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from atedm_kernels.ops.token_drift.reference import distance


def token_drift_native(x: Tensor, projection: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
    """``projection @ x`` ``[B, W, N]``, and its distance from ``seen`` ``[B, 1, N]``; shapes as in the op."""
    observed = F.conv2d(x.to(projection.dtype), projection[:, :, None, None]).flatten(2).contiguous()
    return observed, distance(observed, seen)
