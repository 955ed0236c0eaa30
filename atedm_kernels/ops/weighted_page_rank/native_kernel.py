"""Weighted PageRank by the native CPU library (``csrc/weighted_page_rank.cpp``)."""

from __future__ import annotations

import torch
from torch import Tensor

from atedm_kernels import native


def rank_native(
    function: str, q: Tensor, k: Tensor, lse: Tensor, scale: float, max_iterations: int, tolerance: float
) -> tuple[Tensor, Tensor]:
    """Scores and iterations of either ranking, by the library's ``function``."""
    scores = torch.empty(q.shape[:3], dtype=torch.float32)
    iterations = torch.empty(q.shape[:2], dtype=torch.int32)
    native.call(
        function,
        native.attention_map(q, k, lse, scale),
        min(max_iterations, 2**31 - 1),
        tolerance,
        scores.data_ptr(),
        iterations.data_ptr(),
    )
    return scores, iterations


def weighted_page_rank_native(
    q: Tensor, k: Tensor, lse: Tensor, scale: float, max_iterations: int, tolerance: float
) -> tuple[Tensor, Tensor]:
    """``s ← Aᵀ s`` to its fixed point; shapes as in the public op."""
    return rank_native("atedm_weighted_page_rank", q, k, lse, scale, max_iterations, tolerance)
