"""What the two PageRank ops share: their schema, checks, fake kernel and dispatch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from atedm_kernels._backends import choose
from atedm_kernels._checks import check_attention_map, check_iteration, check_scale, score_dtype, softmax_scale
from atedm_kernels._library import define_op

_BACKENDS = ("triton", "native", "reference")

# Chosen on the trained maps of the embedded model (quality-bf16-256-convergence.json in bench/results), by the overlap
# (Jaccard index) of the kept set with the converged one, mean over blocks and steps: 0.958 after 3 iterations, 0.979
# after 5, 0.993 after 10; at level 2, which takes longest, 0.924, 0.959, 0.985. Five more would change one token in a
# hundred for twice the time. A tolerance of 1e-2 takes 3.7 of the 5 for an overlap of 0.978; 1e-3 takes 4.4 for 0.979.
DEFAULT_MAX_ITERATIONS = 5
DEFAULT_TOLERANCE = 1e-2

# (q, k, lse, scale, max_iterations, tolerance) → (scores, iterations)
Ranking = Callable[[Tensor, Tensor, Tensor, float, int, float], tuple[Tensor, Tensor]]


def define_ranking_op(
    name: str,
    check: Callable[[Tensor, Tensor], None],
    native: Ranking,
    reference: Ranking,
    import_triton: Callable[[], Ranking],
) -> Callable:
    """Register the op ``name`` and return its overload.

    Args:
        check: raises where ``q`` and ``k`` do not fit this op; what both ops ask for is checked here.
        import_triton: imports the Triton implementation when it is first wanted.
    """

    def check_all(q: Tensor, k: Tensor, lse: Tensor, scale: float | None, iterations: int, tolerance: float) -> None:
        check_attention_map(q, k, lse)
        check(q, k)
        check_scale(scale)
        check_iteration(iterations, tolerance)

    def implementation(
        q: Tensor, k: Tensor, lse: Tensor, scale: float | None, max_iterations: int, tolerance: float
    ) -> tuple[Tensor, Tensor]:
        check_all(q, k, lse, scale, max_iterations, tolerance)
        backend, _ = choose(name, _BACKENDS, q.device, q.dtype)
        rank = import_triton() if backend == "triton" else native if backend == "native" else reference
        return rank(q, k, lse, softmax_scale(q, scale), max_iterations, tolerance)

    def fake(
        q: Tensor, k: Tensor, lse: Tensor, scale: float | None, max_iterations: int, tolerance: float
    ) -> tuple[Tensor, Tensor]:
        check_all(q, k, lse, scale, max_iterations, tolerance)
        batch, heads, queries, _ = q.shape
        scores = q.new_empty(batch, heads, queries, dtype=score_dtype(q))
        return scores, q.new_empty(batch, heads, dtype=torch.int32)

    arguments = "Tensor q, Tensor k, Tensor lse, float? scale, int max_iterations, float tolerance"
    return define_op(f"{name}({arguments}) -> (Tensor, Tensor)", implementation, fake, _BACKENDS)
