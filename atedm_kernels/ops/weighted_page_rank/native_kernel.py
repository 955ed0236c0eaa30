"""Weighted PageRank by the native CPU library (``csrc/weighted_page_rank.cpp``)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from atedm_kernels import native


def rank_native(
    function: str,
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    scale: float,
    max_iterations: int,
    tolerance: float,
    initial: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Scores and iterations of either ranking, by the library's ``function``."""
    scores = torch.empty(q.shape[:3], dtype=torch.float32)
    iterations = torch.empty(q.shape[:2], dtype=torch.int32)
    native.call(
        function,
        native.attention_map(q, k, lse, scale),
        min(max_iterations, 2**31 - 1),
        tolerance,
        None if initial is None else initial.data_ptr(),
        None if initial is None else native.strides(initial),
        scores.data_ptr(),
        iterations.data_ptr(),
    )
    return scores, iterations


def weighted_page_rank_native(*arguments: Any) -> tuple[Tensor, Tensor]:
    """``s ← Aᵀ s`` to its fixed point; arguments as in :func:`rank_native`."""
    return rank_native("atedm_weighted_page_rank", *arguments)
