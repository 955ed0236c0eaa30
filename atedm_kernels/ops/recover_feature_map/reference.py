"""Recovery into a feature map, with the residual, in plain PyTorch."""

from __future__ import annotations

from torch import Tensor

from atedm_kernels.ops.gather_tokens.reference import gather_rows_reference


def recover_feature_map_reference(x: Tensor, source: Tensor, residual: Tensor) -> Tensor:
    """``residual[b, :, n // w, n % w] + x[b, source[b, n]]``; shapes as the public op."""
    batch, channels, height, width = residual.shape
    recovered = gather_rows_reference(x, source).view(batch, height, width, channels).permute(0, 3, 1, 2)
    return residual + recovered
