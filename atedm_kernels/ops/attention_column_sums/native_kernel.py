"""Weighted column sums by the native CPU library (``csrc/attention_column_sums.cpp``)."""

from __future__ import annotations

import torch
from torch import Tensor

from atedm_kernels import native


def attention_column_sums_native(q: Tensor, k: Tensor, lse: Tensor, weights: Tensor | None, scale: float) -> Tensor:
    """``Σ_i w_i A_ij``; shapes as in the public op."""
    out = torch.empty(*k.shape[:3], dtype=torch.float32)
    native.call(
        "atedm_attention_column_sums",
        native.attention_map(q, k, lse, scale),
        None if weights is None else weights.data_ptr(),
        None if weights is None else native.strides(weights),
        out.data_ptr(),
    )
    return out
