"""What the two PageRank ops share: schema, checks, fake kernel, defaults."""

from __future__ import annotations

import torch
from torch import Tensor

from atedm_kernels._checks import check_attention_map, check_iteration, check_scale, score_dtype, softmax_scale

# Chosen on the trained maps of the embedded model (quality-bf16-256-convergence.json in bench/results), by the overlap
# (Jaccard index) of the kept set with the converged one, mean over blocks and steps: 0.958 after 3 iterations, 0.979
# after 5, 0.993 after 10; at level 2, which converges slowest, 0.924, 0.959, 0.985. Five more iterations would change
# one token in a hundred and take twice the time. A tolerance of 1e-2 runs 3.7 of the 5 iterations and gives an overlap
# of 0.978; 1e-3 runs 4.4 and gives 0.979.
DEFAULT_MAX_ITERATIONS = 5
DEFAULT_TOLERANCE = 1e-2

SCHEMA = (
    "(Tensor q, Tensor k, Tensor lse, float? scale, int max_iterations, float tolerance) -> (Tensor scores, "
    "Tensor iterations)"
)


def check_ranking(
    q: Tensor, k: Tensor, lse: Tensor, scale: float | None, max_iterations: int, tolerance: float
) -> None:
    check_attention_map(q, k, lse)
    check_scale(scale)
    check_iteration(max_iterations, tolerance)


def fake_ranking(
    q: Tensor, k: Tensor, lse: Tensor, scale: float | None, max_iterations: int, tolerance: float
) -> tuple[Tensor, Tensor]:
    """Uninitialised scores ``[B, H, M]`` and int32 iterations ``[B, H]``."""
    return q.new_empty(q.shape[:3], dtype=score_dtype(q)), q.new_empty(q.shape[:2], dtype=torch.int32)


def prepare_ranking(
    q: Tensor, k: Tensor, lse: Tensor, scale: float | None, max_iterations: int, tolerance: float
) -> tuple[Tensor, Tensor, Tensor, float, int, float]:
    return q, k, lse, softmax_scale(q, scale), max_iterations, tolerance
