"""Generalized weighted PageRank of a cross-attention map (AT-EDM, section 3.2, entropy form) in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from atedm_kernels.ops.attention_column_sums.reference import attention_column_sums_reference
from atedm_kernels.ops.attention_map import log_map_blocks, merge_heads
from atedm_kernels.ops.weighted_page_rank.reference import power_iteration, start

# A row that attends to only one key has entropy 0. The floor keeps its score finite.
ENTROPY_FLOOR = 1e-6


def weighted_page_rank_cross_reference(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    scale: float,
    max_iterations: int,
    tolerance: float,
    initial: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``s_K ← Aᵀ s_Q``, ``s_Q(i) ← Σ_j A_ij s_K(j) / entropy(A_i)``; shapes as in the public op."""
    scores, shape = start(q, initial), lse.shape
    q, k, lse = merge_heads(q), merge_heads(k), merge_heads(lse)

    def step(running: Tensor, scores: Tensor) -> Tensor:
        maps = q[running], k[running], lse[running]
        key_scores = attention_column_sums_reference(*(x[None] for x in maps), scores[None], scale)[0]
        new = torch.empty_like(scores)
        for pair, rows, log_block in log_map_blocks(*maps, scale):
            block = log_block.exp()
            entropy = -(block * log_block).sum(dim=-1)
            received = torch.bmm(block, key_scores[pair, :, None])[..., 0]
            new[pair, rows] = received / entropy.clamp(min=ENTROPY_FLOOR)
        return new

    scores, iterations = power_iteration(step, scores, max_iterations, tolerance)
    return scores.view(shape), iterations.view(shape[:2])
