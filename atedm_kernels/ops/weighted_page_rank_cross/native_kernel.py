"""Weighted PageRank of a cross-attention map by the native CPU library (``csrc/weighted_page_rank_cross.cpp``)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from atedm_kernels.ops.weighted_page_rank.native_kernel import rank_native


def weighted_page_rank_cross_native(*arguments: Any) -> tuple[Tensor, Tensor]:
    """``s_K ← Aᵀ s_Q``, ``s_Q(i) ← Σ_j A_ij s_K(j) / entropy(A_i)``; arguments as in :func:`rank_native`."""
    return rank_native("atedm_weighted_page_rank_cross", *arguments)
