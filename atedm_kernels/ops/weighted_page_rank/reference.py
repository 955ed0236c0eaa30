"""The power iteration of generalized weighted PageRank (AT-EDM, section 3.2) in plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

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


def rank_reference(
    step: Callable[[tuple[Tensor, ...], Tensor, float], Tensor],
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    scale: float,
    max_iterations: int,
    tolerance: float,
    initial: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Scores and iterations of either ranking; shapes as in the public ops.

    Args:
        step: maps ``q, k, lse`` of heads ``[P, …]``, their scores and the scale to new scores, not normalised.
    """
    maps = merge_heads(q), merge_heads(k), merge_heads(lse)

    def step_of(running: Tensor, scores: Tensor) -> Tensor:
        return step(tuple(x[running] for x in maps), scores, scale)

    scores, iterations = power_iteration(step_of, start(q, initial), max_iterations, tolerance)
    return scores.view(lse.shape), iterations.view(lse.shape[:2])


def _step(maps: tuple[Tensor, ...], scores: Tensor, scale: float) -> Tensor:
    return attention_column_sums_reference(*(x[None] for x in maps), scores[None], scale)[0]


def weighted_page_rank_reference(*arguments: Any) -> tuple[Tensor, Tensor]:
    """``s ← Aᵀ s`` to its fixed point; arguments as in :func:`rank_reference`."""
    return rank_reference(_step, *arguments)
