from __future__ import annotations

import torch
from torch import Tensor

from atedm_kernels._backends import choose
from atedm_kernels._checks import (
    check_attention_map,
    check_iteration,
    check_scale,
    score_dtype,
    softmax_scale,
)
from atedm_kernels._library import define_op
from atedm_kernels.ops.weighted_page_rank import DEFAULT_MAX_ITERATIONS, DEFAULT_TOLERANCE
from atedm_kernels.ops.weighted_page_rank_cross.reference import weighted_page_rank_cross_reference

_BACKENDS = ("triton", "reference")


def _check(q: Tensor, k: Tensor, lse: Tensor, scale: float | None, max_iterations: int, tolerance: float) -> None:
    check_attention_map(q, k, lse)
    check_scale(scale)
    check_iteration(max_iterations, tolerance)


def _implementation(
    q: Tensor, k: Tensor, lse: Tensor, scale: float | None, max_iterations: int, tolerance: float
) -> tuple[Tensor, Tensor]:
    _check(q, k, lse, scale, max_iterations, tolerance)
    scale = softmax_scale(q, scale)
    if choose("weighted_page_rank_cross", _BACKENDS, q.device, q.dtype)[0] == "triton":
        from atedm_kernels.ops.weighted_page_rank_cross.triton_kernel import weighted_page_rank_cross_triton

        return weighted_page_rank_cross_triton(q, k, lse, scale, max_iterations, tolerance)
    return weighted_page_rank_cross_reference(q, k, lse, scale, max_iterations, tolerance)


def _fake(
    q: Tensor, k: Tensor, lse: Tensor, scale: float | None, max_iterations: int, tolerance: float
) -> tuple[Tensor, Tensor]:
    _check(q, k, lse, scale, max_iterations, tolerance)
    batch, heads, queries, _ = q.shape
    scores = q.new_empty(batch, heads, queries, dtype=score_dtype(q))
    return scores, q.new_empty(batch, heads, dtype=torch.int32)


_op = define_op(
    "weighted_page_rank_cross(Tensor q, Tensor k, Tensor lse, float? scale, int max_iterations, float tolerance)"
    " -> (Tensor, Tensor)",
    _implementation,
    _fake,
    _BACKENDS,
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
    return _op(q, k, lse, scale, max_iterations, tolerance)
