"""Top-k selection, one program a row: find the threshold bit by bit, then compact by prefix sums.

Nothing is sorted, so ascending order and "ties to the lower index" come for free.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from atedm_kernels._launch import Launch, next_power_of_2, run_all

_MOST_TOKENS_A_STEP = 4096

# The threshold is found two bits at a time; three counts share an int64, 21 bits each. Longer rows take one bit.
_TWO_BIT_LIMIT = 1 << 21


@triton.jit
def _ordered(x):
    """float32 → int32 in the same order; NaN is the lowest, and -0.0 equals 0.0."""
    x = tl.where(x == 0.0, 0.0, x)
    x = tl.where(x == x, x, float("-inf"))
    bits = x.to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def _join_heads(scores, tokens, inside, heads, stride_h, stride_n, RMS: tl.constexpr):
    """Root mean square or mean over the heads, with nothing that overflows or vanishes on the way."""
    scores += tokens.to(tl.int64) * stride_n
    step = tl.full([], 1, tl.int64) * stride_h
    largest = tl.zeros(tokens.shape, tl.float32)
    for h in range(0, heads):
        largest = tl.maximum(largest, tl.abs(tl.load(scores + h * step, mask=inside, other=0.0)))
    # The mean shrinks by a power of two, which rounds nothing, so equal sums stay equal.
    is_large = largest > 1e30
    shrink = tl.where(is_large, 2.0**-40, 1.0)
    divisor = tl.where(largest > 0.0, largest, 1.0)
    total = tl.zeros(tokens.shape, tl.float32)
    is_nan = tl.zeros(tokens.shape, tl.int32)
    for h in range(0, heads):
        score = tl.load(scores + h * step, mask=inside, other=0.0)
        is_nan |= (score != score).to(tl.int32)
        if RMS:
            ratio = tl.div_rn(score, divisor)
            total += ratio * ratio
        else:
            total += score * shrink
    # Division rounds exactly, so that the order of two tokens is that of their scores.
    mean = tl.div_rn(total, tl.zeros_like(total) + heads)
    if RMS:
        joined = tl.where(largest == float("inf"), largest, largest * tl.sqrt_rn(mean))
    else:
        joined = mean * tl.where(is_large, 2.0**40, 1.0)
    return tl.where(is_nan != 0, float("nan"), joined)


@triton.jit
def _select_kernel(
    scores,
    importance,  # [batch, tokens] int32, scratch
    out,  # [batch, keep]
    heads,
    tokens,
    keep,
    stride_b,
    stride_h,
    stride_n,
    RMS: tl.constexpr,
    BLOCK: tl.constexpr,
    BITS: tl.constexpr,
    COUNT_BITS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    scores += row * stride_b
    importance += row * tokens
    out += row * keep
    local = tl.arange(0, BLOCK)

    for start in range(0, tokens, BLOCK):
        offsets = start + local
        inside = offsets < tokens
        joined = _join_heads(scores, offsets, inside, heads, stride_h, stride_n, RMS)
        tl.store(importance + offsets, _ordered(joined), mask=inside)
    # Other threads than those that stored read it back.
    tl.debug_barrier()

    # The largest threshold that at least `keep` values reach, from the highest bit down.
    threshold = tl.full([], -(2**31), tl.int64)
    for bits_done in range(0, 32, BITS):
        unit = tl.full([], 1, tl.int64) << (32 - BITS - bits_done)
        counts = tl.zeros([BLOCK], tl.int64)
        for start in range(0, tokens, BLOCK):
            offsets = start + local
            value = tl.load(importance + offsets, mask=offsets < tokens, other=0).to(tl.int64)
            for digit in tl.static_range(1, 2**BITS):
                reached = (value >= threshold + digit * unit) & (offsets < tokens)
                counts += reached.to(tl.int64) << ((digit - 1) * COUNT_BITS)
        counts = tl.sum(counts, 0)
        step = tl.zeros([], tl.int64)
        for digit in tl.static_range(1, 2**BITS):
            count = (counts >> ((digit - 1) * COUNT_BITS)) & ((1 << COUNT_BITS) - 1)
            step += (count >= keep).to(tl.int64)
        threshold += step * unit

    above = tl.zeros([BLOCK], tl.int32)
    for start in range(0, tokens, BLOCK):
        offsets = start + local
        value = tl.load(importance + offsets, mask=offsets < tokens, other=0).to(tl.int64)
        above += ((value > threshold) & (offsets < tokens)).to(tl.int32)
    ties_wanted = keep - tl.sum(above, 0)

    ties_seen = tl.zeros([], tl.int32)
    written = tl.zeros([], tl.int32)
    for start in range(0, tokens, BLOCK):
        offsets = start + local
        inside = offsets < tokens
        value = tl.load(importance + offsets, mask=inside, other=0).to(tl.int64)
        tie = ((value == threshold) & inside).to(tl.int32)
        tie_rank = ties_seen + tl.cumsum(tie, 0)
        chosen = ((value > threshold) & inside) | ((tie != 0) & (tie_rank <= ties_wanted))
        rank = written + tl.cumsum(chosen.to(tl.int32), 0)
        tl.store(out + rank - 1, offsets.to(tl.int64), mask=chosen & (rank <= keep))
        ties_seen += tl.sum(tie, 0)
        written += tl.sum(chosen.to(tl.int32), 0)


def select_launch(scores: Tensor, importance: Tensor, out: Tensor, reduction: str) -> Launch:
    batch, heads, tokens = scores.shape
    block = min(_MOST_TOKENS_A_STEP, max(128, next_power_of_2(tokens)))
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
            "BITS": 2 if two_bits else 1,
            "COUNT_BITS": 21 if two_bits else 62,
        },
        num_warps=max(4, min(16, block // 256)),
        num_stages=1,
    )


def select_tokens_triton(scores: Tensor, keep: int, reduction: str) -> Tensor:
    """The ``keep`` best tokens of each row, ascending; shapes as the public op."""
    batch, _, tokens = scores.shape
    importance = torch.empty(batch, tokens, dtype=torch.int32, device=scores.device)
    out = torch.empty(batch, keep, dtype=torch.int64, device=scores.device)
    run_all([select_launch(scores, importance, out, reduction)], scores.device)
    return out
