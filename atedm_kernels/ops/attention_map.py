"""The attention map by blocks, for the references: ``A_ij = exp(scale · q_i·k_j − lse_i)``, never stored whole."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from atedm_kernels._checks import score_dtype

# Elements of a block: 16 MB in float32. A 4096-token map of 10 heads would take 671 MB.
BLOCK_ELEMENTS = 4 * 1024 * 1024


def map_blocks(q: Tensor, k: Tensor, lse: Tensor, scale: float) -> Iterator[tuple[slice, slice, Tensor, Tensor]]:
    """Yield ``heads, rows, logits, weights`` of blocks that cover the map once.

    Args:
        q: ``[P, M, D]``, ``P`` = batch times heads. k: ``[P, N, D]``. lse: ``[P, M]``.

    Yields:
        Slices into ``P`` and ``M``, the log of the block of the map, and the block itself,
        both ``[heads, rows, N]`` in float32 (float64 for float64 inputs).
    """
    dtype = score_dtype(q)
    pairs, queries, keys = q.shape[0], q.shape[1], k.shape[1]
    heads_per_block = max(1, BLOCK_ELEMENTS // (queries * keys))
    rows_per_block = max(1, min(queries, BLOCK_ELEMENTS // keys))
    for h in range(0, pairs, heads_per_block):
        heads = slice(h, min(h + heads_per_block, pairs))
        keys_t = k[heads].to(dtype).transpose(1, 2)
        for m in range(0, queries, rows_per_block):
            rows = slice(m, min(m + rows_per_block, queries))
            logits = torch.bmm(q[heads, rows].to(dtype) * scale, keys_t)
            logits -= lse[heads, rows, None].to(dtype)
            yield heads, rows, logits, logits.exp()


def merge_heads(x: Tensor) -> Tensor:
    """``[B, H, ...]`` → ``[B·H, ...]``."""
    return x.reshape(x.shape[0] * x.shape[1], *x.shape[2:])
