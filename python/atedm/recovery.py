"""Recoveries other than a copy of a kept token, for comparison (AT-EDM, ablation)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def sources_or_zero(index: Tensor, tokens: int) -> Tensor:
    """A source map for padding with zeros: a kept token's own slot, and slot ``K``, a token of zeros, for the rest.

    Args:
        index: int64 ``[B, K]``, the kept tokens.

    Returns:
        int64 ``[B, tokens]``.
    """
    batch, keep = index.shape
    slots = torch.arange(keep, device=index.device).expand(batch, -1)
    return torch.full((batch, tokens), keep, device=index.device).scatter(1, index, slots)


def append_zero_token(x: Tensor) -> Tensor:
    """``[B, K, C]`` → ``[B, K + 1, C]``."""
    return F.pad(x, (0, 0, 0, 1))


def interpolate_bicubic(x: Tensor, index: Tensor, height: int, width: int) -> Tensor:
    """Fill dropped tokens bicubically from the kept ones around them: ``[B, K, C]`` → ``[B, height · width, C]``.

    Kept tokens lie anywhere, so they are first averaged into a grid of half the size, and where a cell of that holds
    none, into a quarter, and so on; each coarser grid, resized bicubically, fills the holes of the finer one.
    """
    batch, _, channels = x.shape
    # Computed in float32: repeated averaging would pile up the rounding of 16 bits.
    dtype = torch.promote_types(x.dtype, torch.float32)
    marked = torch.cat([x.to(dtype), x.new_ones(*x.shape[:2], 1, dtype=dtype)], dim=-1)
    full = marked.new_zeros(batch, height * width, channels + 1)
    full = full.scatter(1, index[..., None].expand_as(marked), marked)
    full = full.view(batch, height, width, channels + 1).permute(0, 3, 1, 2)
    filled = _fill(full[:, :channels], full[:, channels:])
    return filled.flatten(2).transpose(1, 2).to(x.dtype)


def _fill(values: Tensor, weight: Tensor) -> Tensor:
    """Fill the positions of ``values`` ``[B, C, h, w]`` whose ``weight`` ``[B, 1, h, w]`` is 0."""
    height, width = values.shape[-2:]
    if height == 1 and width == 1:
        return values
    # Zeros where nothing was kept, so the sums of a cell are those of its kept tokens.
    window = (min(2, height), min(2, width))
    count = F.avg_pool2d(weight, window, ceil_mode=True)
    mean = F.avg_pool2d(values * weight, window, ceil_mode=True) / count.clamp(min=torch.finfo(count.dtype).tiny)
    coarse = _fill(mean, (count > 0).to(values.dtype))
    resized = F.interpolate(coarse, size=(height, width), mode="bicubic", align_corners=False)
    return torch.where(weight > 0, values, resized)
