"""The attention map ``A_ij = exp(scale · q_i·k_j − lse_i)``: in blocks, for the references, and its FLOPs."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from atedm_kernels._checks import score_dtype

# Elements of a block: 4 MB in float32, so that a block stays in a CPU's cache between the passes over it.
# A 4096-token map of 10 heads would take 671 MB.
BLOCK_ELEMENTS = 1024 * 1024


def log_map_blocks(q: Tensor, k: Tensor, lse: Tensor, scale: float) -> Iterator[tuple[slice, slice, Tensor]]:
    """Yield ``heads, rows, log_block`` for blocks that cover the map once.

    Args:
        q: ``[P, M, D]``, ``P`` = batch times heads. k: ``[P, N, D]``. lse: ``[P, M]``.

    Yields:
        Slices into ``P`` and ``M``, and the natural log of that block of the map, ``[heads, rows, N]`` in float32
        (float64 for float64 inputs), which the caller may overwrite.
    """
    dtype = score_dtype(q)
    pairs, queries, keys = q.shape[0], q.shape[1], k.shape[1]
    heads_per_block = max(1, BLOCK_ELEMENTS // (queries * keys))
    rows_per_block = max(1, min(queries, BLOCK_ELEMENTS // keys))
    for h in range(0, pairs, heads_per_block):
        heads = slice(h, min(h + heads_per_block, pairs))
        queries_of, keys_of = q[heads].to(dtype) * scale, k[heads].to(dtype).transpose(1, 2)
        shift = -lse[heads, :, None].to(dtype)
        for m in range(0, queries, rows_per_block):
            rows = slice(m, min(m + rows_per_block, queries))
            yield heads, rows, torch.baddbmm(shift[:, rows], queries_of[:, rows], keys_of)


def map_flops(q: tuple[int, ...], keys: int) -> int:
    """FLOPs of the products of queries of shape ``q`` ``[B, H, M, D]`` with ``keys`` keys: 2·B·H·M·N·D."""
    batch, heads, queries, head_dim = q
    return 2 * batch * heads * queries * keys * head_dim


def merge_heads(x: Tensor) -> Tensor:
    """``[B, H, ...]`` → ``[B·H, ...]``."""
    return x.reshape(x.shape[0] * x.shape[1], *x.shape[2:])
