"""The power iteration of both rankings: its state, its start, and the end of a pass, which computes the new scores.

The scores enter the next product as a bias of the exponent, which adds no cost to the loop over the map. The number of
launches is fixed. A converged head sets a flag, and its programs then return at once, so nothing is decided on the host
and the whole iteration can be captured in a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from atedm_kernels._launch import Launch, run_all
from atedm_kernels.ops.triton_tiles import LOG2E

BLOCK = 1024


@triton.jit
def sum_parts(parts, pair, offsets, mask, splits, pairs, length):
    """``Σ_split parts[split, pair, offsets]``, in the order of the splits."""
    parts += pair * length
    total = tl.load(parts + offsets, mask=mask, other=0.0)
    for split in range(1, splits):
        skip = tl.full([], length, tl.int64) * pairs * split
        total += tl.load(parts + skip + offsets, mask=mask, other=0.0)
    return total


@triton.jit
def finish_pass(
    parts,  # [splits, pairs, tokens]
    lse,  # [pairs, tokens]
    scores,  # [pairs, tokens], read and replaced
    bias,  # [pairs, tokens], replaced: log2 of the scores minus the logsumexp in base 2
    iterations,  # [pairs] int32
    done,  # [pairs] int32
    tolerance,
    pair,
    splits,
    pairs,
    tokens,
    BLOCK: tl.constexpr,
):
    """Compute the new scores of head ``pair`` (int64), their distance from the old ones, and whether the head stops."""
    lse += pair * tokens
    scores += pair * tokens
    bias += pair * tokens
    local = tl.arange(0, BLOCK)

    sums = tl.zeros([BLOCK], tl.float32)
    for start in range(0, tokens, BLOCK):
        offsets = start + local
        sums += sum_parts(parts, pair, offsets, offsets < tokens, splits, pairs, tokens)
    total = tl.sum(sums, 0)

    change = tl.zeros([BLOCK], tl.float32)
    for start in range(0, tokens, BLOCK):
        offsets = start + local
        inside = offsets < tokens
        new = sum_parts(parts, pair, offsets, inside, splits, pairs, tokens) / total
        old = tl.load(scores + offsets, mask=inside, other=0.0)
        # Past the last token, 0 / total is NaN if the total is 0 or NaN.
        change += tl.where(inside, tl.abs(new - old), 0.0)
        # The new scores do not depend on the old ones, so without a barrier a thread could overwrite a score that
        # another has not read yet.
        tl.debug_barrier()
        tl.store(scores + offsets, new, mask=inside)
        tl.store(bias + offsets, tl.log2(new) - tl.load(lse + offsets, mask=inside) * LOG2E, mask=inside)

    tl.store(iterations + pair, tl.load(iterations + pair) + 1)
    tl.store(done + pair, (tl.sum(change, 0) < tolerance).to(tl.int32))


@triton.jit
def _normalise_kernel(
    parts, lse, scores, bias, iterations, done, tolerance, splits, pairs, tokens, BLOCK: tl.constexpr
):
    """End a pass in a separate launch, if its last kernel does not end it."""
    pair = tl.program_id(0).to(tl.int64)
    if tl.load(done + pair) == 0:
        finish_pass(parts, lse, scores, bias, iterations, done, tolerance, pair, splits, pairs, tokens, BLOCK)


@dataclass(frozen=True)
class State:
    """The tensors that each pass of an iteration reads and overwrites.

    ``scores``, ``bias``: float32 ``[B, H, N]``. ``iterations``, ``done`` (flags), ``arrived`` (the number of a head's
    programs that have finished in this pass): int32 ``[B, H]``.
    """

    scores: Tensor
    bias: Tensor
    iterations: Tensor
    done: Tensor
    arrived: Tensor


def normalise_launch(parts: Tensor, lse: Tensor, state: State, tolerance: float) -> Launch:
    """``parts`` ``[splits, B, H, N]``, ``lse`` ``[B, H, N]``."""
    splits, batch, heads, tokens = parts.shape
    return Launch(
        _normalise_kernel,
        grid=batch * heads,
        arguments={
            "parts": parts,
            "lse": lse,
            "scores": state.scores,
            "bias": state.bias,
            "iterations": state.iterations,
            "done": state.done,
            "tolerance": tolerance,
            "splits": splits,
            "pairs": batch * heads,
            "tokens": tokens,
        },
        constants={"BLOCK": BLOCK},
    )


@triton.jit
def _start_kernel(
    lse,  # [pairs, tokens]
    initial,  # [pairs, tokens], or None for uniform scores
    scores,  # [pairs, tokens]; this and the next four are written
    bias,
    iterations,
    done,
    arrived,
    tokens,
    BLOCK: tl.constexpr,
):
    """Start one head: normalise ``initial`` and reset the counters."""
    pair = tl.program_id(0).to(tl.int64)
    local = tl.arange(0, BLOCK)
    score = tl.full([BLOCK], 1.0, tl.float32) / tokens
    if initial is not None:
        initial += pair * tokens
        sums = tl.zeros([BLOCK], tl.float32)
        for start in range(0, tokens, BLOCK):
            sums += tl.load(initial + start + local, mask=start + local < tokens, other=0.0)
        total = tl.sum(sums, 0)
    for start in range(0, tokens, BLOCK):
        offsets = start + local
        inside = offsets < tokens
        if initial is not None:
            score = tl.load(initial + offsets, mask=inside, other=0.0) / total
        tl.store(scores + pair * tokens + offsets, score, mask=inside)
        shift = tl.load(lse + pair * tokens + offsets, mask=inside, other=0.0) * LOG2E
        tl.store(bias + pair * tokens + offsets, tl.log2(score) - shift, mask=inside)
    tl.store(iterations + pair, 0)
    tl.store(done + pair, 0)
    tl.store(arrived + pair, 0)


def empty_state(lse: Tensor) -> State:
    """An uninitialised state for :func:`start_launch`; ``lse`` ``[B, H, N]``."""
    numbers = [torch.empty(lse.shape, dtype=torch.float32, device=lse.device) for _ in range(2)]
    counts = [torch.empty(lse.shape[:2], dtype=torch.int32, device=lse.device) for _ in range(3)]
    return State(*numbers, *counts)


def start_launch(lse: Tensor, initial: Tensor | None, state: State) -> Launch:
    """``lse`` and ``initial`` must be contiguous."""
    batch, heads, tokens = lse.shape
    return Launch(
        _start_kernel,
        grid=batch * heads,
        arguments={"lse": lse, "initial": initial, **vars(state), "tokens": tokens},
        constants={"BLOCK": BLOCK},
    )


def iterate(
    iteration: Callable[..., list[Launch]],
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    scale: float,
    max_iterations: int,
    tolerance: float,
    initial: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Run the launches of ``iteration`` ``max_iterations`` times; return what the public ops return."""
    lse = lse.contiguous()
    state = empty_state(lse)
    launches = iteration(q, k, lse, state, scale, tolerance)
    start = start_launch(lse, None if initial is None else initial.contiguous(), state)
    run_all([start, *launches * max_iterations], q.device)
    return state.scores, state.iterations
