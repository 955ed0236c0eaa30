"""Generalized weighted PageRank of a cross-attention map (AT-EDM, section 3.2, entropy form) in plain PyTorch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from atedm_kernels.ops.attention_column_sums.reference import attention_column_sums_reference
from atedm_kernels.ops.attention_map import log_map_blocks
from atedm_kernels.ops.weighted_page_rank.reference import rank_reference

# A row that attends to only one key has entropy 0. The floor keeps its score finite.
ENTROPY_FLOOR = 1e-6


def _step(maps: tuple[Tensor, ...], scores: Tensor, scale: float) -> Tensor:
    key_scores = attention_column_sums_reference(*(x[None] for x in maps), scores[None], scale)[0]
    new = torch.empty_like(scores)
    for pair, rows, log_block in log_map_blocks(*maps, scale):
        block = log_block.exp()
        entropy = -(block * log_block).sum(dim=-1)
        received = torch.bmm(block, key_scores[pair, :, None])[..., 0]
        new[pair, rows] = received / entropy.clamp(min=ENTROPY_FLOOR)
    return new


def weighted_page_rank_cross_reference(*arguments: Any) -> tuple[Tensor, Tensor]:
    """``s_K ← Aᵀ s_Q``, ``s_Q(i) ← Σ_j A_ij s_K(j) / entropy(A_i)``; arguments as in :func:`rank_reference`."""
    return rank_reference(_step, *arguments)
