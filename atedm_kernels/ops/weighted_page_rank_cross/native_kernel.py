"""Weighted PageRank of a cross-attention map by the native CPU library (``csrc/weighted_page_rank_cross.cpp``)."""

from __future__ import annotations

from torch import Tensor

from atedm_kernels.ops.weighted_page_rank.native_kernel import rank_native


def weighted_page_rank_cross_native(
    q: Tensor, k: Tensor, lse: Tensor, scale: float, max_iterations: int, tolerance: float
) -> tuple[Tensor, Tensor]:
    """``s_K ← Aᵀ s_Q``, ``s_Q(i) ← Σ_j A_ij s_K(j) / entropy(A_i)``; shapes as in the public op."""
    return rank_native("atedm_weighted_page_rank_cross", q, k, lse, scale, max_iterations, tolerance)
