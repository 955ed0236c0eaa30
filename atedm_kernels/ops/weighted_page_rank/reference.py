"""The power iteration of generalized weighted PageRank (AT-EDM, section 3.2) in plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from atedm_kernels._checks import score_dtype
from atedm_kernels.ops.attention_column_sums.reference import attention_column_sums_reference
from atedm_kernels.ops.attention_map import merge_heads


def power_iteration(
    step: Callable[[Tensor, Tensor], Tensor], scores: Tensor, max_iterations: int, tolerance: float
) -> tuple[Tensor, Tensor]:
    """Iterate ``s ← step(s) / Σ step(s)`` in each head until ``Σ|s − s_previous| < tolerance``.

    Args:
        step: maps the positions of the heads that still iterate, and their scores, to new scores.
        scores: ``[P, N]``, the start; ``P`` = batch times heads.

    Returns:
        Scores ``[P, N]`` and the int32 number of iterations ``[P]``. Each head stops on its own.
    """
    iterations = torch.zeros(scores.shape[0], dtype=torch.int32, device=scores.device)
    running = torch.arange(scores.shape[0], device=scores.device)
    for _ in range(max_iterations):
        previous = scores[running]
        new = step(running, previous)
        new = new / new.sum(dim=-1, keepdim=True)
        scores[running] = new
        iterations[running] += 1
        running = running[~((new - previous).abs().sum(dim=-1) < tolerance)]
        if running.numel() == 0:
            break
    return scores, iterations


def start(q: Tensor, initial: Tensor | None) -> Tensor:
    """``[P, M]``: ``initial`` ``[B, H, M]``, each head normalised to sum 1; uniform without it."""
    if initial is None:
        initial = q.new_ones(q.shape[:3], dtype=score_dtype(q))
    initial = merge_heads(initial)
    return initial / initial.sum(dim=-1, keepdim=True)


def weighted_page_rank_reference(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    scale: float,
    max_iterations: int,
    tolerance: float,
    initial: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``s ← Aᵀ s`` to its fixed point; shapes as in the public op."""
    scores, shape = start(q, initial), lse.shape
    q, k, lse = merge_heads(q), merge_heads(k), merge_heads(lse)

    def step(running: Tensor, scores: Tensor) -> Tensor:
        sums = attention_column_sums_reference(
            q[None, running], k[None, running], lse[None, running], scores[None], scale
        )
        return sums[0]

    scores, iterations = power_iteration(step, scores, max_iterations, tolerance)
    return scores.view(shape), iterations.view(shape[:2])
