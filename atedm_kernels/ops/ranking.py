"""Shared by the two PageRank ops: schema, checks, fake kernel, defaults."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from atedm_kernels._checks import (
    check_attention_map,
    check_iteration,
    check_logits,
    check_scale,
    check_shape,
    check_tensor,
    score_dtype,
    softmax_scale,
    values_are_checked,
)

# Chosen on the trained maps of the embedded model (quality-fp32-convergence.json in bench/results), by the overlap
# (Jaccard index) of the kept set with the converged one. The mean over blocks and steps is 0.955 after 3 iterations,
# 0.977 after 5 and 0.992 after 10; at level 2, which converges slowest, it is 0.916, 0.953 and 0.982. Five more
# iterations would change one or two tokens in a hundred and take twice the time. With a tolerance of 1e-2, a head runs
# 3.7 of the 5 iterations on average, and the overlap is 0.976.
DEFAULT_MAX_ITERATIONS = 5
DEFAULT_TOLERANCE = 1e-2

SCHEMA = (
    "(Tensor q, Tensor k, Tensor lse, float? scale, int max_iterations, float tolerance, Tensor? initial=None) -> "
    "(Tensor scores, Tensor iterations)"
)


def check_ranking(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    scale: float | None,
    max_iterations: int,
    tolerance: float,
    initial: Tensor | None,
) -> None:
    check_attention_map(q, k, lse)
    check_scale(scale)
    check_iteration(max_iterations, tolerance)
    if initial is not None:
        check_tensor("initial", initial, "B H M", (lse.dtype,), q.device)
        check_shape("initial", initial, tuple(lse.shape), "the shape of lse")


def check_ranking_values(q: Tensor, k: Tensor, lse: Tensor, *others: Any) -> None:
    """Check that no logit is too large, no initial score negative or NaN, and each head's sum positive and finite."""
    check_logits(lse)
    initial = others[-1]
    if initial is None or not values_are_checked(initial):
        return
    low, sums = initial.amin(), initial.sum(-1)
    if not low >= 0:
        raise ValueError(f"initial holds {low.item()}; expected scores of at least 0")
    wrong = ~((sums > 0) & sums.isfinite())
    if wrong.any():
        head = tuple(wrong.nonzero()[0].tolist())
        raise ValueError(
            f"initial sums to {sums[head].item()} at (batch row, head) {head}; expected a positive, finite sum in each "
            "head"
        )


def fake_ranking(q: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    """Uninitialised scores ``[B, H, M]`` and int32 iterations ``[B, H]``."""
    return q.new_empty(q.shape[:3], dtype=score_dtype(q)), q.new_empty(q.shape[:2], dtype=torch.int32)


def prepare_ranking(q: Tensor, k: Tensor, lse: Tensor, scale: float | None, *others: Any) -> tuple[Any, ...]:
    return q, k, lse, softmax_scale(q, scale), *others
