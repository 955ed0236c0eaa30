"""The ops with inputs of one shape, and the calls that each is compared with."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn import functional as F

import atedm_kernels as ops
from atedm.policy.ranking import WARM_ITERATIONS
from atedm_bench.ops import plain
from atedm_bench.ops.shapes import (
    HEAD_DIM,
    TEXT_TOKENS,
    Shape,
    Work,
    attention_work,
    map_work,
    rows_work,
    selection_work,
)
from atedm_kernels.registry import OPS

OURS, PLAIN, COMPILED, COPY, COLREDUCE = "ours", "plain", "plain compiled", "copy", "flash-colreduce"
ATTENTION = "fused attention"

# Standard deviation of the logits, as in the first blocks of a trained SDXL: no map is flat, and none is one-hot.
_LOGIT_STD = 2.0

Call = Callable[[], object]


@dataclass(frozen=True)
class OpCase:
    """One op on one shape.

    Attributes:
        name: the row's name. op: the custom op. calls: one call per variant. work: the minimum work. times: number of
            attention forwards to compare it with. map_elements: size of the attention map that plain PyTorch stores;
            0 if there is no map.
    """

    name: str
    op: str
    work: Work
    calls: dict[str, Call]
    times: int = 1
    map_elements: int = 0


class OpInputs:
    """Seeded random tensors of one shape, laid out as in diffusers' blocks."""

    def __init__(self, shape: Shape, dtype: torch.dtype, device: torch.device, seed: int = 0) -> None:
        generator = torch.Generator(device).manual_seed(seed)

        def normal(*size: int) -> torch.Tensor:
            return torch.randn(*size, generator=generator, device=device)

        def heads_of(tokens: int, std: float) -> torch.Tensor:
            x = normal(shape.batch, tokens, shape.heads, HEAD_DIM) * std
            return x.to(dtype).transpose(1, 2)

        self.shape, self.dtype = shape, dtype
        std = _LOGIT_STD**0.5
        self.q, self.k, self.v = (heads_of(shape.tokens, s) for s in (std, std, 1.0))
        self.text_k = heads_of(TEXT_TOKENS, std)
        _, self.lse = ops.attention_with_logsumexp(self.q, self.k, self.v)
        _, self.text_lse = ops.attention_with_logsumexp(self.q, self.text_k, self.text_k)
        self.scores = torch.softmax(normal(shape.batch, shape.heads, shape.tokens), dim=-1)
        self.index = ops.select_tokens(self.scores, shape.keep)
        self.source = ops.similarity_source(self.q, self.k, self.lse, self.index)
        self.x = normal(shape.batch, shape.tokens, shape.channels).to(dtype)
        self.compact = ops.gather_tokens(self.x, self.index)
        self.cache = self.x.flip(1)
        self.residual = normal(shape.batch, shape.channels, shape.height, shape.width).to(dtype)
        self.residual_last = self.residual.to(memory_format=torch.channels_last)


def attention_case(inputs: OpInputs) -> OpCase:
    """Return the case that every other row of the shape is compared with."""
    call = {ATTENTION: lambda: F.scaled_dot_product_attention(inputs.q, inputs.k, inputs.v)}
    return OpCase("attention forward", "scaled_dot_product_attention", _attention_work(inputs), call)


def cases(inputs: OpInputs, iterations: int) -> list[OpCase]:
    """Return a case for every op. ``iterations``: number of iterations of the ranking."""
    return [*_attention(inputs), *_rankings(inputs, iterations), *_choices(inputs), *_moves(inputs)]


def _attention_work(i: OpInputs) -> Work:
    return attention_work(OPS["attention_with_logsumexp"].flops(i.q, i.k, i.v), i.shape, i.dtype)


def _map_work(i: OpInputs, op: str, arguments: tuple, rows: int, columns: int, passes: int = 1) -> Work:
    return map_work(OPS[op].flops(*arguments), i.shape, i.dtype, rows, columns, passes)


def _stored_map(i: OpInputs) -> dict[str, int]:
    return {"map_elements": i.lse.numel() * i.shape.tokens}


def _attention(i: OpInputs) -> list[OpCase]:
    """Attention, and the sums over its map."""
    work = _map_work(i, "attention_column_sums", (i.q, i.k, i.lse), i.shape.tokens, i.shape.tokens)
    attention: dict[str, Call] = {OURS: lambda: ops.attention_with_logsumexp(i.q, i.k, i.v)}
    sums: dict[str, Call] = {
        OURS: lambda: ops.attention_column_sums(i.q, i.k, i.lse),
        PLAIN: lambda: plain.column_sums(i.q, i.k),
    }
    if i.q.device.type == "cuda" and importlib.util.find_spec("flash_colreduce"):
        from flash_colreduce import flash_colreduce

        sums[COLREDUCE] = lambda: flash_colreduce(i.q, i.k, reduction="mean")
    weighted: dict[str, Call] = {
        OURS: lambda: ops.attention_column_sums(i.q, i.k, i.lse, i.scores),
        PLAIN: lambda: plain.weighted_column_sums(i.q, i.k, i.scores),
    }
    return [
        OpCase("attention_with_logsumexp", "attention_with_logsumexp", _attention_work(i), attention),
        OpCase("attention_column_sums", "attention_column_sums", work, sums, **_stored_map(i)),
        OpCase("attention_column_sums, weighted", "attention_column_sums", work, weighted, **_stored_map(i)),
    ]


def _rankings(i: OpInputs, iterations: int) -> list[OpCase]:
    self_map, text_map, tokens = (i.q, i.k, i.lse), (i.q, i.text_k, i.text_lse), i.shape.tokens

    def rank(max_iterations: int, tolerance: float, initial: torch.Tensor | None = None) -> Call:
        settings = {"max_iterations": max_iterations, "tolerance": tolerance, "initial": initial}
        return lambda: ops.weighted_page_rank(*self_map, **settings)

    def case(name: str, passes: int, calls: dict[str, Call], times: int) -> OpCase:
        work = _map_work(i, "weighted_page_rank", (*self_map, None, passes), tokens, tokens, passes)
        return OpCase(f"weighted_page_rank, {name}", "weighted_page_rank", work, calls, times, **_stored_map(i))

    def warm(passes: int) -> OpCase:
        calls = {OURS: rank(passes, 0.0, i.scores), PLAIN: lambda: plain.page_rank(i.q, i.k, passes, i.scores)}
        return case(f"{passes} iterations from scores", passes, calls, passes)

    cold = {OURS: rank(iterations, 0.0), PLAIN: lambda: plain.page_rank(i.q, i.k, iterations)}
    # Any change is below this tolerance, so the ranking stops after 1 iteration. What it takes longer than 1 of 1 is
    # the cost of an early stop: the remaining launches still run.
    stopped = {OURS: rank(iterations, 1e9), "ours, 1 of 1": rank(1, 1e9)}
    cross: dict[str, Call] = {
        OURS: lambda: ops.weighted_page_rank_cross(*text_map, max_iterations=iterations, tolerance=0.0),
        PLAIN: lambda: plain.page_rank_cross(i.q, i.text_k, iterations),
    }
    return [
        case(f"{iterations} iterations", iterations, cold, iterations),
        *map(warm, (2, WARM_ITERATIONS)),
        case(f"stopped after 1 of {iterations}", 1, stopped, 1),
        OpCase(
            f"weighted_page_rank_cross, {iterations} iterations",
            "weighted_page_rank_cross",
            _map_work(
                i, "weighted_page_rank_cross", (*text_map, None, iterations), tokens, TEXT_TOKENS, 2 * iterations
            ),
            cross,
            times=iterations,
            map_elements=i.text_lse.numel() * TEXT_TOKENS,
        ),
    ]


def _choices(i: OpInputs) -> list[OpCase]:
    """The ops that choose which tokens to keep, and what the others get."""
    keep, dropped = i.shape.keep, i.shape.tokens - i.shape.keep
    select: dict[str, Call] = {
        OURS: lambda: ops.select_tokens(i.scores, keep),
        PLAIN: lambda: plain.select(i.scores, keep),
    }
    source: dict[str, Call] = {
        OURS: lambda: ops.similarity_source(i.q, i.k, i.lse, i.index),
        PLAIN: lambda: plain.source(i.q, i.k, i.index),
    }
    # Kept tokens' queries by dropped tokens' keys: a kept token refills itself.
    work = _map_work(i, "similarity_source", (i.q, i.k[:, :, :dropped], i.lse, i.index), keep, dropped)
    return [
        OpCase("select_tokens", "select_tokens", selection_work(i.shape), select),
        OpCase("similarity_source", "similarity_source", work, source, **_stored_map(i)),
    ]


def _moves(i: OpInputs) -> list[OpCase]:
    """The ops that move rows, compared with a copy of as many bytes."""
    tokens, keep, dropped = i.shape.tokens, i.shape.keep, i.shape.tokens - i.shape.keep

    def rows(read: int, written: int, indices: int) -> Work:
        return rows_work(i.shape, i.dtype, read, written, indices)

    def case(op: str, suffix: str, work: Work, plainly: Callable[..., object], *arguments: torch.Tensor) -> OpCase:
        ours = getattr(ops, op)
        calls = {OURS: lambda: ours(*arguments), PLAIN: lambda: plainly(*arguments), COPY: _copy_of(work, i.x.device)}
        return OpCase(op + suffix, op, work, calls)

    # A kept row counts as read once, no matter how often it is copied.
    recovered = rows(keep + tokens, tokens, tokens)
    # The kept rows are read from the compact tensor and written to the cache. The dropped ones are read from the cache.
    updated = rows(keep + dropped + tokens, keep + tokens, keep)
    layouts = ((", contiguous", i.residual), (", channels last", i.residual_last))
    return [
        case("gather_tokens", "", rows(keep, keep, keep), plain.gather, i.x, i.index),
        case("recover_tokens", "", rows(keep, tokens, tokens), plain.gather, i.compact, i.source),
        *(
            case("recover_feature_map", layout, recovered, plain.recover_feature_map, i.compact, i.source, residual)
            for layout, residual in layouts
        ),
        *(
            case("update_feature_map", layout, updated, plain.update_feature_map, i.compact, i.index, i.cache, residual)
            for layout, residual in layouts
        ),
    ]


def _copy_of(work: Work, device: torch.device) -> Call:
    here = torch.ones(int(work.bytes) // 2, dtype=torch.uint8, device=device)
    there = torch.empty_like(here)
    return lambda: there.copy_(here)
