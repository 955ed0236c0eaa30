"""Weighted column sums of the attention map in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from atedm_kernels._checks import score_dtype
from atedm_kernels.ops.attention_map import log_map_blocks, merge_heads


def attention_column_sums_reference(q: Tensor, k: Tensor, lse: Tensor, weights: Tensor | None, scale: float) -> Tensor:
    """``Σ_i w_i A_ij``; shapes as in the public op."""
    batch, heads, queries, _ = q.shape
    sums = q.new_zeros(batch * heads, 1, k.shape[2], dtype=score_dtype(q))
    if weights is None:
        weights = torch.full_like(lse, 1.0 / queries)
    weights = merge_heads(weights).to(sums.dtype)
    for pair, rows, log_block in log_map_blocks(merge_heads(q), merge_heads(k), merge_heads(lse), scale):
        sums[pair] += torch.bmm(weights[pair, None, rows], log_block.exp_())
    return sums.view(batch, heads, -1)
