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


def attention_case(shape: Shape, dtype: torch.dtype, inputs: OpInputs) -> OpCase:
    """Return the case that every other row of the shape is compared with."""
    i = inputs
    call = {ATTENTION: lambda: F.scaled_dot_product_attention(i.q, i.k, i.v)}
    return OpCase("attention forward", "scaled_dot_product_attention", _attention_work(shape, dtype, inputs), call)


def _attention_work(shape: Shape, dtype: torch.dtype, inputs: OpInputs) -> Work:
    i = inputs
    return attention_work(OPS["attention_with_logsumexp"].flops(i.q, i.k, i.v), shape, dtype)


def _copy_of(work: Work, device: torch.device) -> Call:
    here = torch.ones(int(work.bytes) // 2, dtype=torch.uint8, device=device)
    there = torch.empty_like(here)
    return lambda: there.copy_(here)


def cases(shape: Shape, dtype: torch.dtype, inputs: OpInputs, iterations: int) -> list[OpCase]:
    """Return a case for every op. ``iterations``: number of iterations of the ranking."""
    i, device = inputs, inputs.q.device
    tokens, keep, dropped = shape.tokens, shape.keep, shape.tokens - shape.keep

    def map_work_of(op: str, arguments: tuple, rows: int, columns: int, passes: int = 1) -> Work:
        return map_work(OPS[op].flops(*arguments), shape, dtype, rows, columns, passes)

    self_map = (i.q, i.k, i.lse)
    one_pass = map_work_of("attention_column_sums", self_map, tokens, tokens)
    text_map = (i.q, i.text_k, i.text_lse)
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

    def rank(max_iterations: int, tolerance: float, initial: torch.Tensor | None = None) -> Call:
        settings = {"max_iterations": max_iterations, "tolerance": tolerance, "initial": initial}
        return lambda: ops.weighted_page_rank(*self_map, **settings)

    def rank_work(passes: int) -> Work:
        return map_work_of("weighted_page_rank", (*self_map, None, passes), tokens, tokens, passes)

    def moving(op: str, suffix: str, work: Work, ours: Call, plainly: Call) -> OpCase:
        return OpCase(op + suffix, op, work, {OURS: ours, PLAIN: plainly, COPY: _copy_of(work, device)})

    def recover(residual: torch.Tensor) -> tuple[Call, Call]:
        return (
            lambda: ops.recover_feature_map(i.compact, i.source, residual),
            lambda: plain.recover_feature_map(i.compact, i.source, residual),
        )

    def update(residual: torch.Tensor) -> tuple[Call, Call]:
        return (
            lambda: ops.update_feature_map(i.compact, i.index, i.cache, residual),
            lambda: plain.update_feature_map(i.compact, i.index, i.cache, residual),
        )

    # A kept row counts as read once, no matter how often it is copied.
    map_rows = rows_work(shape, dtype, keep + tokens, tokens, tokens)
    # The kept rows are read from the compact tensor and written to the cache. The dropped ones are read from the cache.
    update_rows = rows_work(shape, dtype, keep + dropped + tokens, keep + tokens, keep)
    return [
        OpCase(
            "attention_with_logsumexp",
            "attention_with_logsumexp",
            _attention_work(shape, dtype, i),
            {OURS: lambda: ops.attention_with_logsumexp(i.q, i.k, i.v)},
        ),
        OpCase("attention_column_sums", "attention_column_sums", one_pass, sums, **stored),
        OpCase(
            "attention_column_sums, weighted",
            "attention_column_sums",
            one_pass,
            {
                OURS: lambda: ops.attention_column_sums(i.q, i.k, i.lse, i.scores),
                PLAIN: lambda: plain.weighted_column_sums(i.q, i.k, i.scores),
            },
            **stored,
        ),
        OpCase(
            f"weighted_page_rank, {iterations} iterations",
            "weighted_page_rank",
            rank_work(iterations),
            {OURS: rank(iterations, 0.0), PLAIN: lambda: plain.page_rank(i.q, i.k, iterations)},
            times=iterations,
            **stored,
        ),
        *(
            OpCase(
                f"weighted_page_rank, {warm} iterations from scores",
                "weighted_page_rank",
                rank_work(warm),
                {
                    OURS: rank(warm, 0.0, i.scores),
                    PLAIN: lambda warm=warm: plain.page_rank(i.q, i.k, warm, i.scores),
                },
                times=warm,
                **stored,
            )
            for warm in (2, WARM_ITERATIONS)
        ),
        # Any change is below this tolerance, so the ranking stops after 1 iteration. What it takes longer than 1 of 1
        # is the cost of an early stop: the remaining launches still run.
        OpCase(
            f"weighted_page_rank, stopped after 1 of {iterations}",
            "weighted_page_rank",
            rank_work(1),
            {OURS: rank(iterations, 1e9), "ours, 1 of 1": rank(1, 1e9)},
            **stored,
        ),
        OpCase(
            f"weighted_page_rank_cross, {iterations} iterations",
            "weighted_page_rank_cross",
            map_work_of("weighted_page_rank_cross", (*text_map, None, iterations), tokens, TEXT_TOKENS, 2 * iterations),
            {
                OURS: lambda: ops.weighted_page_rank_cross(
                    i.q, i.text_k, i.text_lse, max_iterations=iterations, tolerance=0.0
                ),
                PLAIN: lambda: plain.page_rank_cross(i.q, i.text_k, iterations),
            },
            times=iterations,
            map_elements=pairs * tokens * TEXT_TOKENS,
        ),
        OpCase(
            "select_tokens",
            "select_tokens",
            selection_work(shape),
            {OURS: lambda: ops.select_tokens(i.scores, keep), PLAIN: lambda: plain.select(i.scores, keep)},
        ),
        OpCase(
            "similarity_source",
            "similarity_source",
            # Kept tokens' queries by dropped tokens' keys: a kept token refills itself.
            map_work_of("similarity_source", (i.q, i.k[:, :, :dropped], i.lse, i.index), keep, dropped),
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
        moving("update_feature_map", ", contiguous", update_rows, *update(i.residual)),
        moving("update_feature_map", ", channels last", update_rows, *update(i.residual_last)),
    ]
