"""Gradients of attention in plain PyTorch, in blocks of query rows."""

from __future__ import annotations

import torch
from torch import Tensor

from atedm_kernels._checks import score_dtype
from atedm_kernels.ops.attention_map import BLOCK_ELEMENTS

Gradients = tuple[Tensor, Tensor, Tensor]


def empty_gradients(q: Tensor, k: Tensor, v: Tensor) -> Gradients:
    """Uninitialised ``[B, H, N, D]`` each, stored as ``[B, N, H, D]``, so that joining the heads is free."""
    of_q, of_k, of_v = (x.new_empty(x.transpose(1, 2).shape).transpose(1, 2) for x in (q, k, v))
    return of_q, of_k, of_v


def attention_backward_reference(
    gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float
) -> Gradients:
    """Gradients of ``softmax(scale · q kᵀ) v`` (FlashAttention, appendix B.2); shapes as in the op."""
    dtype = score_dtype(q)
    of_q, of_k, of_v = empty_gradients(q, k, v)
    rows_per_block = max(1, BLOCK_ELEMENTS // k.shape[2])
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            keys, values = k[b, h].to(dtype), v[b, h].to(dtype)
            of_keys, of_values = torch.zeros_like(keys), torch.zeros_like(values)
            for m in range(0, q.shape[2], rows_per_block):
                rows = slice(m, min(m + rows_per_block, q.shape[2]))
                queries, of_out = q[b, h, rows].to(dtype) * scale, gradient[b, h, rows].to(dtype)
                block = torch.exp(queries @ keys.T - lse[b, h, rows, None])
                of_values += block.T @ of_out
                mean = (of_out * out[b, h, rows].to(dtype)).sum(-1, keepdim=True)
                of_logits = block * (of_out @ values.T - mean)
                of_q[b, h, rows] = (of_logits @ keys * scale).to(q.dtype)
                of_keys += of_logits.T @ queries
            of_k[b, h], of_v[b, h] = of_keys.to(k.dtype), of_values.to(v.dtype)
    return of_q, of_k, of_v
