"""Weighted column sums of the attention map: keys stay in place, queries stream past.

``Sᵀ = K Qᵀ`` puts the keys on the rows of the product, so a key's sum runs along registers of one thread. The sum over
queries is kept as several partial sums per key (eight with 16-bit inputs, one per query of a tile with float32). They
are added to without exchange between threads, and joined at the end.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from atedm_kernels._launch import Launch, cdiv, run_all
from atedm_kernels.ops.triton_power_iteration import BLOCK, State, finish_pass
from atedm_kernels.ops.triton_tiles import (
    LOG2E,
    head_pointer,
    is_float32,
    load_tile,
    products,
    query_key_arguments,
    streamed_products,
    tile_constants,
)
from atedm_kernels.tiles import tile_for


@triton.jit
def _column_sums_kernel(
    q,
    k,
    lse,  # [pairs, queries]
    weights,  # [pairs, queries], or None for 1
    bias,  # [pairs, queries], or None: log2(weights) minus the logsumexp in base 2, used instead of lse and weights
    done,  # [pairs] int32, or None: a head whose flag is set is skipped
    scores,  # [pairs, queries], overwritten with the new scores, or None; bias, iterations and done are updated too
    iterations,  # [pairs] int32
    arrived,  # [pairs] int32, the programs of the head that have finished: 0 before and after the pass
    tolerance,
    out,  # [splits, pairs, keys]
    scale_log2,
    factor,
    pairs,
    queries,
    keys,
    queries_per_split,  # a multiple of BLOCK_M
    heads,
    q_stride_b,
    q_stride_h,
    q_stride_n,
    q_stride_d,
    k_stride_b,
    k_stride_h,
    k_stride_n,
    k_stride_d,
    ALIGNMENT: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM_A: tl.constexpr,
    DIM_B: tl.constexpr,
    STREAMED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PARTIAL_SUMS: tl.constexpr,
    SCORES_PER_STEP: tl.constexpr,
):
    key_tiles = tl.cdiv(keys, BLOCK_N)
    program = tl.program_id(0)
    pair = ((program // key_tiles) % pairs).to(tl.int64)
    split = program // key_tiles // pairs
    if done is not None:  # noqa: SIM102  (decided at compile time, so it cannot join the next condition)
        if tl.load(done + pair) != 0:
            return

    columns = (program % key_tiles) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = head_pointer(k, pair, heads, k_stride_b, k_stride_h, ALIGNMENT)
    filled = columns < keys
    if not STREAMED:
        k_a, k_b = load_tile(k, columns, filled, k_stride_n, k_stride_d, ALIGNMENT, HEAD_DIM, DIM_A, DIM_B)

    begin = split * queries_per_split
    end = tl.minimum(begin + queries_per_split, queries)
    local_rows = tl.arange(0, BLOCK_M)
    q = head_pointer(q, pair, heads, q_stride_b, q_stride_h, ALIGNMENT) + begin.to(tl.int64) * q_stride_n
    q_step = tl.full([], BLOCK_M, tl.int64) * q_stride_n
    first = pair * queries

    sums = tl.zeros([BLOCK_N, PARTIAL_SUMS], tl.float32)
    for start in tl.range(begin, end, BLOCK_M):
        rows = start + local_rows
        inside = rows < queries
        if STREAMED:
            s = streamed_products(
                k,
                columns,
                filled,
                k_stride_n,
                k_stride_d,
                q,
                local_rows,
                inside,
                q_stride_n,
                q_stride_d,
                ALIGNMENT,
                HEAD_DIM,
                DIM_A,
            )
        else:
            q_a, q_b = load_tile(q, local_rows, inside, q_stride_n, q_stride_d, ALIGNMENT, HEAD_DIM, DIM_A, DIM_B)
            s = products(k_a, k_b, q_a, q_b, DIM_B)
        # A row past the end has products 0 and bias -inf: its weight is exp2(-inf) = 0, so no mask is needed below.
        if bias is not None:
            shift = tl.load(bias + first + rows, mask=inside, other=float("-inf"))
        else:
            shift = tl.load(lse + first + rows, mask=inside, other=float("inf")) * -LOG2E
        p = tl.exp2(s * scale_log2 + shift[None, :])
        # Not folded into the exponent: a caller's weights may be negative.
        if weights is not None:
            p *= tl.load(weights + first + rows, mask=inside, other=0.0)[None, :]
        if PARTIAL_SUMS == BLOCK_M:
            sums += p
        else:
            sums += tl.sum(tl.reshape(p, [BLOCK_N, BLOCK_M // PARTIAL_SUMS, PARTIAL_SUMS]), 1)
        q += q_step

    skip = (split.to(tl.int64) * pairs + pair) * keys
    tl.store(out + skip + columns, tl.sum(sums, 1) * factor, mask=filled)

    if scores is not None:
        # The last program of a head reads the sums of all of them and ends the pass. The counter orders only the
        # memory accesses of the thread that counts, so all threads of the program wait for each other first.
        splits = tl.cdiv(queries, queries_per_split)
        tl.debug_barrier()
        if tl.atomic_add(arrived + pair, 1, sem="acq_rel") == key_tiles * splits - 1:
            finish_pass(out, lse, scores, bias, iterations, done, tolerance, pair, splits, pairs, keys, SCORES_PER_STEP)
            tl.store(arrived + pair, 0)


OP = "attention_column_sums"

_MAX_SPLITS = 16

_NO_STATE = dict.fromkeys(("scores", "bias", "iterations", "done", "arrived"))

# Partial sums and a ranking's bias take at most this fraction of the memory of a head's map in 16 bits.
_SCRATCH_OF_MAP = 0.01


def query_splits(q: Tensor, k: Tensor) -> tuple[int, int]:
    """The number of parts that the queries are split into, and the queries per part (a multiple of the tile)."""
    tile = tile_for(OP, q)
    programs = q.shape[0] * q.shape[1] * cdiv(k.shape[2], tile.block_n)
    tiles = cdiv(q.shape[2], tile.block_m)
    affordable = int(_SCRATCH_OF_MAP * 2 * q.shape[2] / 4) - 1
    splits = max(1, min(cdiv(tile.programs, programs), _MAX_SPLITS, tiles // 4, affordable))
    tiles_per_split = cdiv(tiles, splits)
    return cdiv(tiles, tiles_per_split), tiles_per_split * tile.block_m


def column_sums_launch(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    partial: Tensor,
    scale: float,
    *,
    weights: Tensor | None = None,
    state: State | None = None,
    tolerance: float | None = None,
) -> Launch:
    """Sum each part of the queries into ``partial`` ``[splits, B, H, N]``; only ``q`` and ``k`` may be strided.

    With ``state``, the launch is part of a power iteration, and the bias of the state takes the place of weights. With
    ``tolerance`` too (self-attention only), the launch is a whole pass of the iteration and updates the state.
    """
    if state is None:
        read = {}
    elif tolerance is None:
        read = {"bias": state.bias, "done": state.done}
    else:
        read = vars(state)
    tile = tile_for(OP, q)
    batch, heads, queries, _ = q.shape
    keys = k.shape[2]
    splits, queries_per_split = query_splits(q, k)
    return Launch(
        _column_sums_kernel,
        grid=cdiv(keys, tile.block_n) * batch * heads * splits,
        arguments={
            **query_key_arguments(q, k),
            "lse": lse,
            "weights": weights,
            **_NO_STATE,
            **read,
            "tolerance": tolerance,
            "out": partial,
            "scale_log2": scale * LOG2E.value,
            "factor": 1.0 / queries if weights is None and state is None else 1.0,
            "pairs": batch * heads,
            "queries": queries,
            "keys": keys,
            "queries_per_split": queries_per_split,
        },
        constants={
            **tile_constants(q, k),
            "BLOCK_M": tile.block_m,
            "BLOCK_N": tile.block_n,
            "PARTIAL_SUMS": tile.block_m if is_float32(q) else 8,
            "SCORES_PER_STEP": BLOCK,
        },
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        max_registers=tile.max_registers,
    )


def empty_partial_sums(q: Tensor, k: Tensor) -> Tensor:
    """Uninitialised ``[splits, B, H, N]`` for :func:`column_sums_launch`."""
    splits, _ = query_splits(q, k)
    return torch.empty(splits, *k.shape[:3], dtype=torch.float32, device=q.device)


def attention_column_sums_triton(q: Tensor, k: Tensor, lse: Tensor, weights: Tensor | None, scale: float) -> Tensor:
    """``Σ_i w_i A_ij``; shapes as in the public op."""
    partial = empty_partial_sums(q, k)
    weights = None if weights is None else weights.contiguous()
    run_all([column_sums_launch(q, k, lse.contiguous(), partial, scale, weights=weights)], q.device)
    return partial[0] if partial.shape[0] == 1 else partial.sum(dim=0)
