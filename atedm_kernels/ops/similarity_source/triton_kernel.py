"""Which kept token refills each dropped one: attention summed over the heads, tile by tile, and its running maximum.

The kernels list the dropped tokens first and compute the map only where a kept token attends to a dropped one. Tiles
are transposed: a row is a dropped token's key, a column a kept token's query, so the maximum over the kept tokens runs
along rows. Each part of the kept tokens writes one int64 per row: the bits of the similarity above the complement of
the slot. The largest of these is the largest similarity with the lowest slot, whatever the order of the comparisons.
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
def _prepare_kernel(
    lse,  # [batch, heads, tokens]
    index,  # [batch, slots]
    shift,  # [batch, heads, padded_slots]
    dropped,  # [batch, tokens]
    out,  # [batch, tokens]
    batch_size,
    heads,
    tokens,
    slots,
    padded_slots,
    BLOCK: tl.constexpr,
):
    """List the dropped tokens (one program per batch row); gather the kept tokens' logsumexp (one per row and head)."""
    program = tl.program_id(0)
    if program < batch_size:
        batch = program.to(tl.int64)
        _list_dropped(index + batch * slots, dropped + batch * tokens, out + batch * tokens, tokens, slots, BLOCK)
    else:
        pair = (program - batch_size).to(tl.int64)
        index += pair // heads * slots
        _gather_shift(lse + pair * tokens, index, shift + pair * padded_slots, tokens, slots, padded_slots, BLOCK)


@triton.jit
def _gather_shift(
    lse,  # [tokens]
    index,  # [slots]
    shift,  # [padded_slots]: in base 2; NaN past the last slot
    tokens,
    slots,
    padded_slots,
    BLOCK: tl.constexpr,
):
    for start in range(0, padded_slots, BLOCK):
        slot = start + tl.arange(0, BLOCK)
        kept = load_index(index, slot, slot < slots, tokens)
        value = tl.load(lse + kept, mask=slot < slots, other=float("nan"))
        tl.store(shift + slot, value * LOG2E, mask=slot < padded_slots)


@triton.jit
def _list_dropped(
    index,  # [slots]
    dropped,  # [tokens]: the dropped tokens, ascending, followed by -1
    out,  # [tokens]: a kept token's slot, 0 for a dropped one
    tokens,
    slots,
    BLOCK: tl.constexpr,
):
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
        # A dropped token has slot 0 until the search writes it; the search covers at most ``tokens - slots`` rows.
        tl.store(out + offsets, tl.where(is_dropped != 0, 0, slot), mask=offsets < tokens)
        before += tl.sum(is_dropped, 0)


@triton.jit
def _similarity_kernel(
    q,
    k,
    shift,  # [batch, heads, padded_slots]: logsumexp in base 2 of the kept tokens, NaN past the last
    index,  # [batch, slots]
    dropped,  # [batch, tokens]
    out,  # [splits, batch, tokens] packed, or [batch, tokens] slots; only dropped tokens are written
    scale_log2,
    batch_size,
    tokens,
    count,  # number of dropped tokens
    slots,
    padded_slots,  # the next multiple of BLOCK_N
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
    shift += batch * heads * padded_slots
    q_step = tl.full([], 1, tl.int64) * aligned(q_stride_h, ALIGNMENT)
    k_step = tl.full([], 1, tl.int64) * aligned(k_stride_h, ALIGNMENT)

    best = tl.full([BLOCK_M], -1.0, tl.float32)
    best_slot = tl.zeros([BLOCK_M], tl.int32)
    begin = split * slots_per_split
    for start in range(begin, tl.minimum(begin + slots_per_split, slots), BLOCK_N):
        slot = start + tl.arange(0, BLOCK_N)
        # Slots past the end load token 0, so no mask is needed; their NaN shift excludes them.
        kept = load_index(index, slot, slot < slots, tokens).to(tl.int32)
        every = tl.full([BLOCK_N], 1, tl.int1)
        similarity = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        q_head = q
        k_head = k
        # Stored consecutively: scattered loads would take two address registers for each column that a thread holds.
        shift_head = shift + start
        for _ in tl.range(0, heads):
            if STREAMED:
                s = streamed_products(
                    k_head,
                    rows,
                    inside,
                    k_stride_n,
                    k_stride_d,
                    q_head,
                    kept,
                    every,
                    q_stride_n,
                    q_stride_d,
                    ALIGNMENT,
                    HEAD_DIM,
                    DIM_A,
                )
            else:
                k_a, k_b = load_tile(k_head, rows, inside, k_stride_n, k_stride_d, ALIGNMENT, HEAD_DIM, DIM_A, DIM_B)
                q_a, q_b = load_tile(q_head, kept, every, q_stride_n, q_stride_d, ALIGNMENT, HEAD_DIM, DIM_A, DIM_B)
                s = products(k_a, k_b, q_a, q_b, DIM_B)
            columns_shift = tl.load(shift_head + tl.arange(0, BLOCK_N))
            similarity += tl.exp2(s * scale_log2 - columns_shift[None, :])
            q_head += q_step
            k_head += k_step
            shift_head += padded_slots
        # NaN counts as least similar, including that of slots past the end.
        similarity = tl.where(similarity == similarity, similarity, -1.0)
        tile_best = tl.max(similarity, 1)
        tile_slot = tl.min(tl.where(similarity == tile_best[:, None], slot[None, :], slots), 1)
        better = tile_best > best
        best_slot = tl.where(better, tile_slot, best_slot)
        best = tl.maximum(best, tile_best)

    if PACKED:
        out += (split.to(tl.int64) * batch_size + batch) * tokens
        # Similarities are at least 0. The sign bit of -1 makes its packed value negative, below all others.
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

_PREPARED_PER_STEP = 4096
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
    batch, heads, tokens, _ = q.shape
    slots = index.shape[1]
    count = tokens - slots
    tile = tile_for(OP, q)
    padded_slots = cdiv(slots, tile.block_n) * tile.block_n
    shift = torch.empty(batch, heads, padded_slots, dtype=torch.float32, device=q.device)
    dropped = torch.empty(batch, tokens, dtype=torch.int32, device=q.device)
    preparation = Launch(
        _prepare_kernel,
        grid=batch if count == 0 else batch + batch * heads,
        arguments={
            **{"lse": lse, "index": index, "shift": shift, "dropped": dropped, "out": out, "batch_size": batch},
            **{"heads": heads, "tokens": tokens, "slots": slots, "padded_slots": padded_slots},
        },
        constants={"BLOCK": _PREPARED_PER_STEP},
        num_warps=8,
        num_stages=1,
    )
    if count == 0:
        return [preparation]
    splits, slots_per_split = slot_splits(q, index)
    packed = splits > 1
    parts = torch.empty(splits, batch, tokens, dtype=torch.int64, device=q.device) if packed else out
    search = Launch(
        _similarity_kernel,
        grid=cdiv(count, tile.block_m) * batch * splits,
        arguments={
            **query_key_arguments(q, k),
            "shift": shift,
            "index": index,
            "dropped": dropped,
            "out": parts,
            "scale_log2": scale * LOG2E.value,
            "batch_size": batch,
            "tokens": tokens,
            "count": count,
            "slots": slots,
            "padded_slots": padded_slots,
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
        return [preparation, search]
    join = Launch(
        _join_kernel,
        grid=cdiv(count, _JOINED_PER_PROGRAM) * batch,
        arguments={
            **{"parts": parts, "dropped": dropped, "out": out, "splits": splits},
            **{"batch_size": batch, "tokens": tokens, "count": count},
        },
        constants={"BLOCK": _JOINED_PER_PROGRAM},
    )
    return [preparation, search, join]


def similarity_source_triton(q: Tensor, k: Tensor, lse: Tensor, index: Tensor, scale: float) -> Tensor:
    """``argmax_j mean_h A[index[j], i]``; a kept token takes its own slot; shapes as in the public op."""
    out = torch.empty(q.shape[0], q.shape[2], dtype=torch.int64, device=q.device)
    run_all(similarity_launches(q, k, lse.contiguous(), index.contiguous(), scale, out), q.device)
    return out
