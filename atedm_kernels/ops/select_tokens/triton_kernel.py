"""Top-k selection, one program per row: find the threshold bit by bit, then compact by prefix sums.

Nothing is sorted, so ascending order and "ties to the lower index" come for free.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from atedm_kernels._launch import Launch, next_power_of_2, run_all

# Rows of up to this many tokens stay in registers from the first pass to the last (16 values per thread).
_MAX_TOKENS_IN_REGISTERS = 8192
_TOKENS_PER_STEP = 4096

# The threshold is found two bits at a time; three counts share an int64, 21 bits each. Longer rows use one bit.
_TWO_BIT_LIMIT = 1 << 21


@triton.jit
def _ordered(x):
    """float32 → uint32 in the same order; NaN is the lowest, and -0.0 equals 0.0."""
    x = tl.where(x == 0.0, 0.0, x)
    x = tl.where(x == x, x, float("-inf"))
    bits = x.to(tl.int32, bitcast=True)
    return tl.where(bits < 0, ~bits, bits ^ -0x80000000).to(tl.uint32, bitcast=True)


@triton.jit
def _join_heads(scores, tokens, inside, heads, stride_h, stride_n, RMS: tl.constexpr):
    """Root mean square or mean over the heads; in float64, where no square overflows or vanishes."""
    scores += tokens.to(tl.int64) * stride_n
    total = tl.zeros(tokens.shape, tl.float64)
    # Unrolled, so that the reads of several heads are in flight at once.
    for h in tl.range(0, heads, loop_unroll_factor=4):
        score = tl.load(scores + h * tl.full([], 1, tl.int64) * stride_h, mask=inside, other=0.0).to(tl.float64)
        total += score * score if RMS else score
    mean = total / heads
    joined = tl.sqrt(mean) if RMS else mean
    return joined.to(tl.float32)


@triton.jit
def _reached(value, inside, threshold, unit, BITS: tl.constexpr, COUNT_BITS: tl.constexpr):
    """For each digit, 1 if ``value`` reaches ``threshold + digit · unit``, else 0, packed side by side in an int64."""
    ones = tl.zeros(value.shape, tl.int64)
    for digit in tl.static_range(1, 2**BITS):
        ones += ((value >= threshold + digit * unit) & inside).to(tl.int64) << ((digit - 1) * COUNT_BITS)
    return ones


@triton.jit
def _compact(value, inside, offsets, out, threshold, ties_wanted, ties_seen, written, keep):
    """Store the chosen tokens of ``offsets`` after the ``written`` ones; return ties seen and tokens written so far."""
    tie = ((value == threshold) & inside).to(tl.int32)
    tie_rank = ties_seen + tl.cumsum(tie, 0)
    chosen = ((value > threshold) & inside) | ((tie != 0) & (tie_rank <= ties_wanted))
    rank = written + tl.cumsum(chosen.to(tl.int32), 0)
    tl.store(out + rank - 1, offsets.to(tl.int64), mask=chosen & (rank <= keep))
    return ties_seen + tl.sum(tie, 0), written + tl.sum(chosen.to(tl.int32), 0)


@triton.jit
def _select_kernel(
    scores,
    importance,  # [batch, tokens] uint32, scratch for rows that do not fit in registers
    out,  # [batch, keep]
    heads,
    tokens,
    keep,
    stride_b,
    stride_h,
    stride_n,
    RMS: tl.constexpr,
    BLOCK: tl.constexpr,
    IN_REGISTERS: tl.constexpr,
    BITS: tl.constexpr,
    COUNT_BITS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    scores += row * stride_b
    out += row * keep
    local = tl.arange(0, BLOCK)

    if IN_REGISTERS:
        held_inside = local < tokens
        held = _ordered(_join_heads(scores, local, held_inside, heads, stride_h, stride_n, RMS))
    else:
        importance += row * tokens
        for start in range(0, tokens, BLOCK):
            offsets = start + local
            inside = offsets < tokens
            joined = _join_heads(scores, offsets, inside, heads, stride_h, stride_n, RMS)
            tl.store(importance + offsets, _ordered(joined), mask=inside)
        # The loops below read what other threads stored here.
        tl.debug_barrier()

    # The largest threshold that at least `keep` values reach, from the highest bit down.
    threshold = tl.full([], 0, tl.uint32)
    for bits_done in range(0, 32, BITS):
        unit = tl.full([], 1, tl.uint32) << (32 - BITS - bits_done)
        if IN_REGISTERS:
            counts = _reached(held, held_inside, threshold, unit, BITS, COUNT_BITS)
        else:
            counts = tl.zeros([BLOCK], tl.int64)
            for start in range(0, tokens, BLOCK):
                offsets = start + local
                value = tl.load(importance + offsets, mask=offsets < tokens, other=0)
                counts += _reached(value, offsets < tokens, threshold, unit, BITS, COUNT_BITS)
        counts = tl.sum(counts, 0)
        step = tl.zeros([], tl.uint32)
        for digit in tl.static_range(1, 2**BITS):
            count = (counts >> ((digit - 1) * COUNT_BITS)) & ((1 << COUNT_BITS) - 1)
            step += (count >= keep).to(tl.uint32)
        threshold += step * unit

    zero = tl.zeros([], tl.int32)
    if IN_REGISTERS:
        ties_wanted = keep - tl.sum(((held > threshold) & held_inside).to(tl.int32), 0)
        _compact(held, held_inside, local, out, threshold, ties_wanted, zero, zero, keep)
    else:
        above = tl.zeros([BLOCK], tl.int32)
        for start in range(0, tokens, BLOCK):
            offsets = start + local
            value = tl.load(importance + offsets, mask=offsets < tokens, other=0)
            above += ((value > threshold) & (offsets < tokens)).to(tl.int32)
        ties_wanted = keep - tl.sum(above, 0)
        ties_seen = zero
        written = zero
        for start in range(0, tokens, BLOCK):
            offsets = start + local
            value = tl.load(importance + offsets, mask=offsets < tokens, other=0)
            ties_seen, written = _compact(
                value, offsets < tokens, offsets, out, threshold, ties_wanted, ties_seen, written, keep
            )


def _in_registers(tokens: int) -> bool:
    return tokens <= _MAX_TOKENS_IN_REGISTERS


def select_launch(scores: Tensor, importance: Tensor | None, out: Tensor, reduction: str) -> Launch:
    """``importance`` is uint32 ``[B, N]`` or None, from :func:`scratch`."""
    batch, heads, tokens = scores.shape
    in_registers = _in_registers(tokens)
    block = max(128, next_power_of_2(tokens)) if in_registers else _TOKENS_PER_STEP
    two_bits = tokens < _TWO_BIT_LIMIT
    return Launch(
        _select_kernel,
        grid=batch,
        arguments={
            "scores": scores,
            "importance": importance,
            "out": out,
            "heads": heads,
            "tokens": tokens,
            "keep": out.shape[1],
            "stride_b": scores.stride(0),
            "stride_h": scores.stride(1),
            "stride_n": scores.stride(2),
        },
        constants={
            "RMS": reduction == "rms",
            "BLOCK": block,
            "IN_REGISTERS": in_registers,
            "BITS": 2 if two_bits else 1,
            "COUNT_BITS": 21 if two_bits else 62,
        },
        # Few values per thread: the row is read once, and many warps hide the latency. With more values, Triton 3.6
        # spills.
        num_warps=max(4, min(16, block // 512)),
        num_stages=1,
    )


def scratch(scores: Tensor) -> Tensor | None:
    """Memory for the importance of rows that do not fit in registers; None if they fit."""
    batch, _, tokens = scores.shape
    return None if _in_registers(tokens) else scores.new_empty(batch, tokens, dtype=torch.uint32)


def select_tokens_triton(scores: Tensor, keep: int, reduction: str) -> Tensor:
    """The ``keep`` best tokens of each row, ascending; shapes as in the public op."""
    out = torch.empty(scores.shape[0], keep, dtype=torch.int64, device=scores.device)
    run_all([select_launch(scores, scratch(scores), out, reduction)], scores.device)
    return out
