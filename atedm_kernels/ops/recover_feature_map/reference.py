"""Recovery into a feature map, with the residual, in plain PyTorch, and the output that every backend fills."""

from __future__ import annotations

import torch
from torch import Tensor

from atedm_kernels.ops.gather_tokens.reference import gather_rows_reference


def empty_feature_map(x: Tensor, residual: Tensor) -> Tensor:
    """Uninitialised output in the memory format of ``residual`` and the dtype of the sum."""
    # Decided by the strides, so that a slice of a channels-last map counts as channels-last too.
    channels_last = residual.stride(1) == 1 and residual.shape[1] > 1 and not residual.is_contiguous()
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    dtype = torch.promote_types(x.dtype, residual.dtype)
    return torch.empty_like(residual, dtype=dtype, memory_format=memory_format)


def recover_feature_map_reference(x: Tensor, source: Tensor, residual: Tensor) -> Tensor:
    """``residual[b, :, n // w, n % w] + x[b, source[b, n]]``; shapes as in the public op."""
    batch, channels, height, width = residual.shape
    recovered = gather_rows_reference(x, source).view(batch, height, width, channels).permute(0, 3, 1, 2)
    return empty_feature_map(x, residual).copy_(residual + recovered)
