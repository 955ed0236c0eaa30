"""Ranking and recovery by the keys of the first self-attention, and a grid that is always kept: ours, beside the
paper's by its attention map.

Attention says what a token looks at, which need not be like it. How alike two tokens are shows best in their keys
(ToMe, section 3): here by ``Σ_h exp(cos(k_hi, k_hj))``, the attention map of keys of length 1 with themselves, without
its softmax. So the kernels for attention maps serve, and no map is stored.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

import atedm_kernels as kernels


def unit_keys(k: Tensor) -> Tensor:
    """Keys ``[B, H, N, D]`` scaled to length 1; shorter ones than 1e-4 stay short."""
    return F.normalize(k, dim=-1, eps=1e-4)  # in fp16 the usual 1e-12 is 0


def _no_softmax(unit: Tensor) -> Tensor:
    """A logsumexp of 0, which leaves ``exp(cos)`` as it is: ``[B, H, N]``."""
    dtype = torch.promote_types(unit.dtype, torch.float32)
    return torch.zeros(unit.shape[:3], dtype=dtype, device=unit.device)


def rank_by_keys(unit: Tensor) -> Tensor:
    """How little of a token others have: ``1 / mean_j exp(cos(k_hi, k_hj))``, from 1/e to e.

    One pass over the map, where PageRank takes several.

    Args:
        unit: ``[B, H, N, D]``, see :func:`unit_keys`.

    Returns:
        float32 ``[B, H, N]``.
    """
    return kernels.attention_column_sums(unit, unit, _no_softmax(unit), scale=1.0).reciprocal()


def sources_by_keys(unit: Tensor, index: Tensor) -> Tensor:
    """A source map: for a dropped token the kept one whose keys are most like its own, ties to the lowest slot.

    Args:
        unit: ``[B, H, N, D]``, see :func:`unit_keys`. index: int64 ``[B, K]``, the kept tokens.

    Returns:
        int64 ``[B, N]``; a kept token has its own slot.
    """
    return kernels.similarity_source(unit, unit, _no_softmax(unit), index, scale=1.0)


def grid_first(scores: Tensor, height: int, width: int, stride: int, keep: int) -> Tensor:
    """``scores`` ``[B, H, N]`` by which the tokens at the crossings of a grid are chosen before all others.

    The grid is made as much coarser than ``stride`` as it takes to keep all of its crossings.

    Args:
        height, width: of the map of ``N`` tokens. keep: how many are going to be chosen.
    """
    while -(-height // stride) * -(-width // stride) > keep:
        stride += 1
    crossing = torch.zeros(height, width, dtype=torch.bool, device=scores.device)
    crossing[::stride, ::stride] = True
    return scores.masked_fill(crossing.flatten(), math.inf)
