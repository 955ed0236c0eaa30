"""Recoveries other than the similarity-based copy, for comparison (AT-EDM, table of the ablation)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def scatter_tokens(x: Tensor, index: Tensor, tokens: int) -> Tensor:
    """``[B, K, C]`` at the positions ``index`` ``[B, K]`` of ``[B, tokens, C]``, zero elsewhere."""
    full = x.new_zeros(x.shape[0], tokens, x.shape[2])
    return full.scatter(1, index[..., None].expand_as(x), x)


def recover_zeros(x: Tensor, index: Tensor, residual: Tensor) -> Tensor:
    """Dropped tokens add nothing: they keep the residual ``[B, C, h, w]`` that enters the attention block."""
    batch, channels, height, width = residual.shape
    full = scatter_tokens(x, index, height * width)
    return residual + full.view(batch, height, width, channels).permute(0, 3, 1, 2)


def recover_bicubic(x: Tensor, index: Tensor, residual: Tensor) -> Tensor:
    """Dropped tokens are interpolated bicubically from the kept ones around them.

    Kept tokens lie anywhere, so they are first averaged into a grid of half the size, and where a cell of that holds
    none, into a quarter, and so on; each coarser grid, resized bicubically, fills the holes of the finer one.
    """
    batch, channels, height, width = residual.shape
    tokens = torch.cat([x.float(), x.new_ones(x.shape[0], x.shape[1], 1, dtype=torch.float32)], dim=-1)
    full = scatter_tokens(tokens, index, height * width).view(batch, height, width, channels + 1).permute(0, 3, 1, 2)
    filled = _fill(full[:, :channels], full[:, channels:])
    return residual + filled.to(x.dtype)


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
