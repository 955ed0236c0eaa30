"""PageRank of a cross-attention map: column sums to the keys, then a pass over the rows back to the queries."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from atedm_kernels._launch import Launch, cdiv
from atedm_kernels.ops.attention_column_sums.triton_kernel import column_sums_launch, empty_partial_sums
from atedm_kernels.ops.triton_power_iteration import State, iterate, normalise_launch, sum_parts
from atedm_kernels.ops.triton_tiles import (
    LOG2E,
    head_pointer,
    load_tile,
    products,
    query_key_arguments,
    streamed_products,
    tile_constants,
)
from atedm_kernels.ops.weighted_page_rank_cross.reference import ENTROPY_FLOOR
from atedm_kernels.tiles import tile_for


@triton.jit
def _rows_kernel(
    q,
    k,
    lse,  # [pairs, queries]
    parts,  # [splits, pairs, keys]: the keys' scores
    done,  # [pairs] int32
    out,  # [pairs, queries]
    scale,
    splits,
    pairs,
    queries,
    keys,
    heads,
    q_stride_b,
    q_stride_h,
    q_stride_n,
    q_stride_d,
    k_stride_b,
    k_stride_h,
    k_stride_n,
    k_stride_d,
    FLOOR: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM_A: tl.constexpr,
    DIM_B: tl.constexpr,
    STREAMED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """``Σ_j A_ij s_j / max(−Σ_j A_ij ln A_ij, floor)`` of a tile of queries."""
    query_tiles = tl.cdiv(queries, BLOCK_M)
    program = tl.program_id(0)
    pair = (program // query_tiles).to(tl.int64)
    if tl.load(done + pair) != 0:
        return
    rows = (program % query_tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
    filled = rows < queries
    q = head_pointer(q, pair, heads, q_stride_b, q_stride_h, ALIGNMENT)
    k = head_pointer(k, pair, heads, k_stride_b, k_stride_h, ALIGNMENT)
    if not STREAMED:
        q_a, q_b = load_tile(q, rows, filled, q_stride_n, q_stride_d, ALIGNMENT, HEAD_DIM, DIM_A, DIM_B)
    row_lse = tl.load(lse + pair * queries + rows, mask=filled, other=0.0)

    received = tl.zeros([BLOCK_M], tl.float32)
    entropy = tl.zeros([BLOCK_M], tl.float32)
    for start in range(0, keys, BLOCK_N):
        columns = start + tl.arange(0, BLOCK_N)
        inside = columns < keys
        key_scores = sum_parts(parts, pair, columns, inside, splits, pairs, keys)
        if STREAMED:
            s = streamed_products(
                q,
                rows,
                filled,
                q_stride_n,
                q_stride_d,
                k,
                columns,
                inside,
                k_stride_n,
                k_stride_d,
                ALIGNMENT,
                HEAD_DIM,
                DIM_A,
            )
        else:
            k_a, k_b = load_tile(k, columns, inside, k_stride_n, k_stride_d, ALIGNMENT, HEAD_DIM, DIM_A, DIM_B)
            s = products(q_a, q_b, k_a, k_b, DIM_B)
        log_p = s * scale - row_lse[:, None]
        p = tl.where(inside[None, :], tl.exp2(log_p * LOG2E), 0.0)
        received += tl.sum(p * key_scores[None, :], 1)
        # Rounding of the logsumexp can make log_p of the only key positive; the floor below covers that too.
        entropy -= tl.sum(p * log_p, 1)

    # Written so that a NaN entropy stays NaN.
    entropy = tl.where(entropy < FLOOR, FLOOR, entropy)
    tl.store(out + pair * queries + rows, received / entropy, mask=filled)


OP = "weighted_page_rank_cross"


def rows_launch(q: Tensor, k: Tensor, lse: Tensor, parts: Tensor, done: Tensor, out: Tensor, scale: float) -> Launch:
    tile = tile_for(OP, q)
    batch, heads, queries, _ = q.shape
    return Launch(
        _rows_kernel,
        grid=cdiv(queries, tile.block_m) * batch * heads,
        arguments={
            **query_key_arguments(q, k),
            "lse": lse,
            "parts": parts,
            "done": done,
            "out": out,
            "scale": scale,
            "splits": parts.shape[0],
            "pairs": batch * heads,
            "queries": queries,
            "keys": k.shape[2],
        },
        constants={
            "FLOOR": ENTROPY_FLOOR,
            **tile_constants(q, k),
            "BLOCK_M": tile.block_m,
            "BLOCK_N": tile.block_n,
        },
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        max_registers=tile.max_registers,
    )


def iteration_launches(q: Tensor, k: Tensor, lse: Tensor, state: State, scale: float, tolerance: float) -> list[Launch]:
    """The launches of one iteration. Running them again continues from ``state``."""
    key_parts = empty_partial_sums(q, k)
    new = torch.empty(1, *lse.shape, dtype=torch.float32, device=q.device)
    return [
        column_sums_launch(q, k, lse, key_parts, scale, state=state),
        rows_launch(q, k, lse, key_parts, state.done, new, scale),
        normalise_launch(new, lse, state, tolerance),
    ]


def weighted_page_rank_cross_triton(*arguments: Any) -> tuple[Tensor, Tensor]:
    """``s_K ← Aᵀ s_Q``, ``s_Q(i) ← Σ_j A_ij s_K(j) / entropy(A_i)``; arguments as in :func:`iterate`."""
    return iterate(iteration_launches, *arguments)
