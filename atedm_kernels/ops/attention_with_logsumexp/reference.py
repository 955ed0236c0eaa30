"""Attention and its logsumexp in plain PyTorch, in blocks of query rows."""

from __future__ import annotations

import torch
from torch import Tensor

from atedm_kernels._checks import score_dtype
from atedm_kernels.ops.attention_map import BLOCK_ELEMENTS


def attention_with_logsumexp_reference(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """``softmax(scale · q kᵀ) v`` and ``log Σ_j exp(scale · q_i·k_j)``; shapes as in the public op."""
    dtype = score_dtype(q)
    batch, heads, queries, _ = q.shape
    out = q.new_empty(batch, queries, heads, v.shape[3]).transpose(1, 2)
    lse = q.new_empty(batch, heads, queries, dtype=dtype)
    rows_per_block = max(1, BLOCK_ELEMENTS // k.shape[2])
    for b in range(batch):
        for h in range(heads):
            keys, values = k[b, h].to(dtype).T, v[b, h].to(dtype)
            for m in range(0, queries, rows_per_block):
                rows = slice(m, min(m + rows_per_block, queries))
                logits = (q[b, h, rows].to(dtype) * scale) @ keys
                lse[b, h, rows] = torch.logsumexp(logits, dim=-1)
                out[b, h, rows] = (torch.softmax(logits, dim=-1) @ values).to(q.dtype)
    return out, lse
