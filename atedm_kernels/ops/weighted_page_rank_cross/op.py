from __future__ import annotations

from torch import Tensor

from atedm_kernels._checks import check_iteration, check_scale, check_tensors
from atedm_kernels.ops.ranking import DEFAULT_MAX_ITERATIONS, DEFAULT_TOLERANCE, Ranking, define_ranking_op
from atedm_kernels.ops.weighted_page_rank_cross.native_kernel import weighted_page_rank_cross_native
from atedm_kernels.ops.weighted_page_rank_cross.reference import weighted_page_rank_cross_reference


def _import_triton() -> Ranking:
    from atedm_kernels.ops.weighted_page_rank_cross.triton_kernel import weighted_page_rank_cross_triton

    return weighted_page_rank_cross_triton


def _any_lengths(q: Tensor, k: Tensor) -> None:
    """Image and text may have any number of tokens each."""


_op = define_ranking_op(
    "weighted_page_rank_cross",
    _any_lengths,
    weighted_page_rank_cross_native,
    weighted_page_rank_cross_reference,
    _import_triton,
)


def weighted_page_rank_cross(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    *,
    scale: float | None = None,
    max_iterations: int = DEFAULT_MAX_ITERATIONS,
    tolerance: float = DEFAULT_TOLERANCE,
) -> tuple[Tensor, Tensor]:
    """Importance of the queries of a cross-attention map: its weighted PageRank (AT-EDM, section 3.2).

    Image tokens are the queries, text tokens the keys. From ``s_Q = 1/M``: ``s_K ← Aᵀ s_Q``, then ``s_Q(i) ←
    Σ_j A_ij s_K(j) / Σ_j (−A_ij ln A_ij)`` (entropies under 1e-6 count as 1e-6), normalised to sum 1, in each
    head on its own until ``Σ|s_Q − s_Q,previous| < tolerance`` or ``max_iterations``.

    Args:
        q: ``[B, H, M, D]``, fp16, bf16 or fp32 (float64 too, for verification), ``D`` from 8 to 256, any strides.
        k: ``[B, H, N, D]``, dtype and device of ``q``.
        lse: ``[B, H, M]`` float32, from :func:`attention_with_logsumexp` on the same ``q``, ``k`` and ``scale``.
        scale: factor of the logits; ``1/sqrt(D)`` by default.
        max_iterations: at least 1. tolerance: at least 0; 0 runs every iteration.

    Returns:
        ``scores`` ``[B, H, M]`` float32, each head summing to 1, and ``iterations`` int32 ``[B, H]``, those run.

    Raises:
        ValueError: an argument that does not fit. TypeError: a dtype that is not served.
    """
    check_tensors(q=q, k=k, lse=lse)
    check_scale(scale)
    check_iteration(max_iterations, tolerance)
    return _op(q, k, lse, scale, max_iterations, tolerance)
