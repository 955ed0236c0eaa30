"""The ops with inputs of one shape, and what each of them is measured against."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn import functional as F

import atedm_kernels as ops
from atedm.bench.ops import plain
from atedm.bench.ops.shapes import (
    HEAD_DIM,
    TEXT_TOKENS,
    Shape,
    Work,
    attention_work,
    map_work,
    rows_work,
    selection_work,
)

OURS, PLAIN, COMPILED, COPY, COLREDUCE = "ours", "plain", "plain compiled", "copy", "flash-colreduce"
ATTENTION = "fused attention"

# Of the logits, as a trained SDXL's first blocks have them: no map is flat, none is one-hot.
_LOGIT_STD = 2.0

Call = Callable[[], object]


@dataclass(frozen=True)
class Case:
    """One op on one shape.

    Attributes:
        name: of the row. op: the custom op. calls: by variant. work: the least there is to do; ``times`` it is
            repeated. map_elements: of the attention map that plain PyTorch stores; 0 where there is none.
    """

    name: str
    op: str
    work: Work
    calls: dict[str, Call]
    times: int = 1
    map_elements: int = 0


class Inputs:
    """Seeded random tensors of one shape, laid out as diffusers' blocks have them."""

    def __init__(self, shape: Shape, dtype: torch.dtype, device: torch.device, seed: int = 0) -> None:
        generator = torch.Generator(device).manual_seed(seed)

        def normal(*size: int) -> torch.Tensor:
            return torch.randn(*size, generator=generator, device=device)

        def heads_of(tokens: int, std: float) -> torch.Tensor:
            x = normal(shape.batch, tokens, shape.heads, HEAD_DIM) * std
            return x.to(dtype).transpose(1, 2)

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
        self.residual = normal(shape.batch, shape.channels, shape.height, shape.width).to(dtype)
        self.residual_last = self.residual.to(memory_format=torch.channels_last)


def attention_case(shape: Shape, dtype: torch.dtype, inputs: Inputs) -> Case:
    """What every other row of the shape is compared with."""
    i = inputs
    call = {ATTENTION: lambda: F.scaled_dot_product_attention(i.q, i.k, i.v)}
    return Case("attention forward", "scaled_dot_product_attention", attention_work(shape, dtype), call)


def _copy_of(work: Work, device: torch.device) -> Call:
    here = torch.ones(int(work.bytes) // 2, dtype=torch.uint8, device=device)
    there = torch.empty_like(here)
    return lambda: there.copy_(here)


def cases(shape: Shape, dtype: torch.dtype, inputs: Inputs, iterations: int) -> list[Case]:
    """Every op; ``iterations`` of the ranking."""
    i, device = inputs, inputs.q.device
    tokens, keep, dropped = shape.tokens, shape.keep, shape.tokens - shape.keep
    whole = map_work(shape, dtype, tokens, tokens)
    cross = map_work(shape, dtype, tokens, TEXT_TOKENS)
    on_gpu = device.type == "cuda"

    sums: dict[str, Call] = {
        OURS: lambda: ops.attention_column_sums(i.q, i.k, i.lse),
        PLAIN: lambda: plain.column_sums(i.q, i.k),
    }
    if on_gpu and importlib.util.find_spec("flash_colreduce"):
        from flash_colreduce import flash_colreduce

        sums[COLREDUCE] = lambda: flash_colreduce(i.q, i.k, reduction="mean")

    pairs = shape.batch * shape.heads
    stored = {"map_elements": pairs * tokens**2}

    def rank(most: int, tolerance: float) -> Call:
        return lambda: ops.weighted_page_rank(i.q, i.k, i.lse, max_iterations=most, tolerance=tolerance)

    def moving(op: str, suffix: str, work: Work, ours: Call, plainly: Call) -> Case:
        return Case(op + suffix, op, work, {OURS: ours, PLAIN: plainly, COPY: _copy_of(work, device)})

    def recover(residual: torch.Tensor) -> tuple[Call, Call]:
        return (
            lambda: ops.recover_feature_map(i.compact, i.source, residual),
            lambda: plain.recover_feature_map(i.compact, i.source, residual),
        )

    # A kept row is read once, however often it is copied.
    map_rows = rows_work(shape, dtype, keep + tokens, tokens, tokens)
    return [
        Case(
            "attention_with_logsumexp",
            "attention_with_logsumexp",
            attention_work(shape, dtype),
            {OURS: lambda: ops.attention_with_logsumexp(i.q, i.k, i.v)},
        ),
        Case("attention_column_sums", "attention_column_sums", whole, sums, **stored),
        Case(
            "attention_column_sums, weighted",
            "attention_column_sums",
            whole,
            {
                OURS: lambda: ops.attention_column_sums(i.q, i.k, i.lse, i.scores),
                PLAIN: lambda: plain.weighted_column_sums(i.q, i.k, i.scores),
            },
            **stored,
        ),
        Case(
            f"weighted_page_rank, {iterations} iterations",
            "weighted_page_rank",
            whole * iterations,
            {OURS: rank(iterations, 0.0), PLAIN: lambda: plain.page_rank(i.q, i.k, iterations)},
            times=iterations,
            **stored,
        ),
        # Any change is less than this tolerance: what is left of the launches is the price of an early stop.
        Case(
            f"weighted_page_rank, stopped after 1 of {iterations}",
            "weighted_page_rank",
            whole,
            {OURS: rank(iterations, 1e9), "ours, 1 of 1": rank(1, 1e9)},
            **stored,
        ),
        Case(
            f"weighted_page_rank_cross, {iterations} iterations",
            "weighted_page_rank_cross",
            cross * (2 * iterations),
            {
                OURS: lambda: ops.weighted_page_rank_cross(
                    i.q, i.text_k, i.text_lse, max_iterations=iterations, tolerance=0.0
                ),
                PLAIN: lambda: plain.page_rank_cross(i.q, i.text_k, iterations),
            },
            times=iterations,
            map_elements=pairs * tokens * TEXT_TOKENS,
        ),
        Case(
            "select_tokens",
            "select_tokens",
            selection_work(shape),
            {OURS: lambda: ops.select_tokens(i.scores, keep), PLAIN: lambda: plain.select(i.scores, keep)},
        ),
        Case(
            "similarity_source",
            "similarity_source",
            map_work(shape, dtype, dropped, keep),
            {
                OURS: lambda: ops.similarity_source(i.q, i.k, i.lse, i.index),
                PLAIN: lambda: plain.source(i.q, i.k, i.index),
            },
            **stored,
        ),
        moving(
            "gather_tokens",
            "",
            rows_work(shape, dtype, keep, keep, keep),
            lambda: ops.gather_tokens(i.x, i.index),
            lambda: plain.gather(i.x, i.index),
        ),
        moving(
            "recover_tokens",
            "",
            rows_work(shape, dtype, keep, tokens, tokens),
            lambda: ops.recover_tokens(i.compact, i.source),
            lambda: plain.gather(i.compact, i.source),
        ),
        moving("recover_feature_map", ", contiguous", map_rows, *recover(i.residual)),
        moving("recover_feature_map", ", channels last", map_rows, *recover(i.residual_last)),
    ]
