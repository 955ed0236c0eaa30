"""Update of cached tokens and their feature map in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from atedm_kernels.ops.gather_tokens.reference import gather_rows_reference
from atedm_kernels.ops.recover_feature_map.reference import empty_feature_map


def update_feature_map_reference(x: Tensor, index: Tensor, cache: Tensor, residual: Tensor) -> Tensor:
    """Write ``x`` into ``cache``, then ``residual[b, :, n // w, n % w] + cache[b, n]``; shapes as in the public op."""
    # Each token searches for its slot, as in the kernels. A scatter on a GPU would take any of equal indices, and fail
    # on one out of range.
    tokens = torch.arange(cache.shape[1], device=index.device).repeat(index.shape[0], 1)
    slot = torch.searchsorted(index.contiguous(), tokens, right=True).sub(1).clamp(min=0)
    is_kept = index.gather(1, slot) == tokens
    cache.copy_(torch.where(is_kept[..., None], gather_rows_reference(x, slot), cache))
    cached_map = cache.unflatten(1, residual.shape[2:]).permute(0, 3, 1, 2)
    return empty_feature_map(x, residual).copy_(residual + cached_map)
