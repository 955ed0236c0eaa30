"""Which kept token refills each dropped one: attention summed over the heads, tile by tile, and its running maximum.

The kernels list the dropped tokens first and compute only their rows of the map. Each part of the kept tokens writes
one int64 per row: the bits of the similarity above the complement of the slot. The largest of these is the most similar
token with the lowest slot, in whatever order parts are compared.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from atedm_kernels._launch import Launch, cdiv, run_all
from atedm_kernels.ops.gather_tokens.triton_kernel import load_index
from atedm_kernels.ops.triton_tiles import (
    LOG2E,
    aligned,
    load_tile,
    products,
    query_key_arguments,
    streamed_products,
    tile_constants,
)
from atedm_kernels.tiles import tile_for

_LOW_BITS = tl.constexpr(0x7FFFFFFF)


@triton.jit
def _dropped_kernel(
    index,  # [batch, slots]
    dropped,  # [batch, tokens]: the dropped tokens, ascending, followed by -1
    out,  # [batch, tokens]: a kept token's slot, 0 for a dropped one
    tokens,
    slots,
    BLOCK: tl.constexpr,
):
    """List the tokens that one row of ``index`` does not name."""
    batch = tl.program_id(0).to(tl.int64)
    index += batch * slots
    dropped += batch * tokens
    out += batch * tokens
    local = tl.arange(0, BLOCK)
    for start in range(0, tokens, BLOCK):
        offsets = start + local
        tl.store(out + offsets, tl.full([BLOCK], 0, tl.int64) + slots, mask=offsets < tokens)
        tl.store(dropped + offsets, tl.full([BLOCK], -1, tl.int32), mask=offsets < tokens)
    # The next pass reads or replaces what other threads wrote.
    tl.debug_barrier()
    for start in range(0, slots, BLOCK):
        slot = start + local
        kept = load_index(index, slot, slot < slots, tokens)
        # If the index names a token twice, the lower slot wins, whatever the order.
        tl.atomic_min(out + kept, slot.to(tl.int64), mask=slot < slots, sem="relaxed")
    tl.debug_barrier()
    before = tl.zeros([], tl.int32)
    for start in range(0, tokens, BLOCK):
        offsets = start + local
        slot = tl.load(out + offsets, mask=offsets < tokens, other=0)
        is_dropped = ((slot == slots) & (offsets < tokens)).to(tl.int32)
        tl.store(dropped + before + tl.cumsum(is_dropped, 0) - 1, offsets, mask=is_dropped != 0)
        # Zero until the search writes it; the search covers at most ``tokens - slots`` rows.
        tl.store(out + offsets, tl.where(is_dropped != 0, 0, slot), mask=offsets < tokens)
        before += tl.sum(is_dropped, 0)


@triton.jit
def _similarity_kernel(
    q,
    k,
    lse,  # [batch, heads, tokens]
    index,  # [batch, slots]
    dropped,  # [batch, tokens]
    out,  # [splits, batch, tokens] packed, or [batch, tokens] slots; only dropped tokens are written
    scale_log2,
    batch_size,
    tokens,
    count,  # of dropped tokens
    slots,
    slots_per_split,  # a multiple of BLOCK_N
    heads,
    q_stride_b,
    q_stride_h,
    q_stride_n,
    q_stride_d,
    k_stride_b,
    k_stride_h,
    k_stride_n,
    k_stride_d,
    PACKED: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM_A: tl.constexpr,
    DIM_B: tl.constexpr,
    STREAMED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    row_tiles = tl.cdiv(count, BLOCK_M)
    program = tl.program_id(0)
    batch = (program // row_tiles % batch_size).to(tl.int64)
    split = program // row_tiles // batch_size
    local_rows = tl.arange(0, BLOCK_M)
    place = (program % row_tiles) * BLOCK_M + local_rows
    rows = tl.load(dropped + batch * tokens + place, mask=place < count, other=-1)
    inside = rows >= 0
    rows = tl.maximum(rows, 0)
    q += batch * aligned(q_stride_b, ALIGNMENT)
    k += batch * aligned(k_stride_b, ALIGNMENT)
    index += batch * slots
    lse += batch * heads * tokens
    q_step = tl.full([], 1, tl.int64) * aligned(q_stride_h, ALIGNMENT)
    k_step = tl.full([], 1, tl.int64) * aligned(k_stride_h, ALIGNMENT)

    best = tl.full([BLOCK_M], -1.0, tl.float32)
    best_slot = tl.zeros([BLOCK_M], tl.int32)
    begin = split * slots_per_split
    for start in range(begin, tl.minimum(begin + slots_per_split, slots), BLOCK_N):
        slot = start + tl.arange(0, BLOCK_N)
        filled = slot < slots
        kept = load_index(index, slot, filled, tokens).to(tl.int32)
        similarity = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        q_head = q
        k_head = k
        lse_head = lse
        for _ in tl.range(0, heads):
            if STREAMED:
                s = streamed_products(
                    q_head,
                    rows,
                    inside,
                    q_stride_n,
                    q_stride_d,
                    k_head,
                    kept,
                    filled,
                    k_stride_n,
                    k_stride_d,
                    ALIGNMENT,
                    HEAD_DIM,
                    DIM_A,
                )
            else:
                q_a, q_b = load_tile(q_head, rows, inside, q_stride_n, q_stride_d, ALIGNMENT, HEAD_DIM, DIM_A, DIM_B)
                k_a, k_b = load_tile(k_head, kept, filled, k_stride_n, k_stride_d, ALIGNMENT, HEAD_DIM, DIM_A, DIM_B)
                s = products(q_a, q_b, k_a, k_b, DIM_B)
            lse_log2 = tl.load(lse_head + rows, mask=inside, other=float("inf")) * LOG2E
            similarity += tl.exp2(s * scale_log2 - lse_log2[:, None])
            q_head += q_step
            k_head += k_step
            lse_head += tokens
        # NaN and slots past the end count as least similar.
        similarity = tl.where((similarity == similarity) & filled[None, :], similarity, -1.0)
        tile_best = tl.max(similarity, 1)
        tile_slot = tl.min(tl.where(similarity == tile_best[:, None], slot[None, :], slots), 1)
        better = tile_best > best
        best_slot = tl.where(better, tile_slot, best_slot)
        best = tl.maximum(best, tile_best)

    if PACKED:
        out += (split.to(tl.int64) * batch_size + batch) * tokens
        # Similarities are at least 0; the sign bit of -1 makes the packed value negative, the smallest of all.
        packed = (best.to(tl.int32, bitcast=True).to(tl.int64) << 32) | (best_slot ^ _LOW_BITS).to(tl.int64)
        tl.store(out + rows, packed, mask=inside)
    else:
        tl.store(out + batch * tokens + rows, best_slot.to(tl.int64), mask=inside)


@triton.jit
def _join_kernel(parts, dropped, out, splits, batch_size, tokens, count, BLOCK: tl.constexpr):
    """Slots of the dropped tokens from the packed parts ``[splits, batch, tokens]``."""
    blocks = tl.cdiv(count, BLOCK)
    batch = (tl.program_id(0) // blocks).to(tl.int64)
    place = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    rows = tl.load(dropped + batch * tokens + place, mask=place < count, other=-1)
    inside = rows >= 0
    rows = batch * tokens + tl.maximum(rows, 0)
    best = tl.load(parts + rows, mask=inside, other=0)
    for split in range(1, splits):
        skip = tl.full([], tokens, tl.int64) * batch_size * split
        best = tl.maximum(best, tl.load(parts + skip + rows, mask=inside, other=0))
    tl.store(out + rows, (best & _LOW_BITS) ^ _LOW_BITS, mask=inside)


OP = "similarity_source"

_MAX_SPLITS = 16

_LISTED_PER_STEP = 4096
_JOINED_PER_PROGRAM = 256


def slot_splits(q: Tensor, index: Tensor) -> tuple[int, int]:
    """The number of parts that the kept tokens are split into, and the slots per part (a multiple of the tile)."""
    tile = tile_for(OP, q)
    programs = q.shape[0] * cdiv(q.shape[2] - index.shape[1], tile.block_m)
    tiles = cdiv(index.shape[1], tile.block_n)
    splits = max(1, min(cdiv(tile.programs, programs), _MAX_SPLITS, tiles))
    tiles_per_split = cdiv(tiles, splits)
    return cdiv(tiles, tiles_per_split), tiles_per_split * tile.block_n


def similarity_launches(q: Tensor, k: Tensor, lse: Tensor, index: Tensor, scale: float, out: Tensor) -> list[Launch]:
    """Write slots into ``out`` ``[B, N]``; ``lse`` and ``index`` must be contiguous."""
    batch, _, tokens, _ = q.shape
    slots = index.shape[1]
    dropped = torch.empty(batch, tokens, dtype=torch.int32, device=q.device)
    listing = Launch(
        _dropped_kernel,
        grid=batch,
        arguments={"index": index, "dropped": dropped, "out": out, "tokens": tokens, "slots": slots},
        constants={"BLOCK": _LISTED_PER_STEP},
        num_warps=8,
        num_stages=1,
    )
    count = tokens - slots
    if count == 0:
        return [listing]
    tile = tile_for(OP, q)
    splits, slots_per_split = slot_splits(q, index)
    packed = splits > 1
    parts = torch.empty(splits, batch, tokens, dtype=torch.int64, device=q.device) if packed else out
    search = Launch(
        _similarity_kernel,
        grid=cdiv(count, tile.block_m) * batch * splits,
        arguments={
            **query_key_arguments(q, k),
            "lse": lse,
            "index": index,
            "dropped": dropped,
            "out": parts,
            "scale_log2": scale * LOG2E.value,
            "batch_size": batch,
            "tokens": tokens,
            "count": count,
            "slots": slots,
            "slots_per_split": slots_per_split,
        },
        constants={
            "PACKED": packed,
            **tile_constants(q, k),
            "BLOCK_M": tile.block_m,
            "BLOCK_N": tile.block_n,
        },
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        max_registers=tile.max_registers,
    )
    if not packed:
        return [listing, search]
    join = Launch(
        _join_kernel,
        grid=cdiv(count, _JOINED_PER_PROGRAM) * batch,
        arguments={
            **{"parts": parts, "dropped": dropped, "out": out, "splits": splits},
            **{"batch_size": batch, "tokens": tokens, "count": count},
        },
        constants={"BLOCK": _JOINED_PER_PROGRAM},
    )
    return [listing, search, join]


def similarity_source_triton(q: Tensor, k: Tensor, lse: Tensor, index: Tensor, scale: float) -> Tensor:
    """``argmax_j mean_h A[i, index[j]]``; a kept token takes its own slot; shapes as in the public op."""
    out = torch.empty(q.shape[0], q.shape[2], dtype=torch.int64, device=q.device)
    run_all(similarity_launches(q, k, lse.contiguous(), index.contiguous(), scale, out), q.device)
    return out
