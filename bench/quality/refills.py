"""Studies what refills dropped tokens on real maps: how many share a source, how far away and how similar it is.

It also measures whether a block keeps the same tokens step after step.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import atedm
import atedm_kernels as kernels
from atedm.app.prompts import PromptCase, Sampling
from atedm.policy.attention_map import AttentionMap
from atedm.policy.options import BY_KEYS
from atedm.policy.ranking import KeyRanking
from atedm.policy.recovery import RECOVERIES
from atedm.policy.selection import grid_first, kept_tokens
from atedm.unet.blocks import attention_blocks
from atedm_bench.quality.convergence import RunningBlock
from atedm_bench.quality.images import run_without_decoding
from atedm_bench.quality.settings import PUBLISHED
from atedm_bench.rankings import page_rank

# This fraction of the kept tokens, the most used ones, are hubs. The study measures how many tokens they refill.
HUB_FRACTION = 0.05


@dataclass(frozen=True)
class Way:
    """One way to choose and refill tokens: ``rank(q, k, lse)`` and ``find_sources(q, k, lse, index)``."""

    rank: Callable[[Tensor, Tensor, Tensor], Tensor]
    find_sources: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
    recovery: str
    grid: int | None = None


def _rank_by_keys(q: Tensor, k: Tensor, lse: Tensor) -> Tensor:
    return KeyRanking().scores(AttentionMap(q, k, lse, None), None)[0]


def _by_keys(q: Tensor, k: Tensor, lse: Tensor, index: Tensor) -> Tensor:
    return RECOVERIES["keys"].source(AttentionMap(q, k, lse, None), index)


WAYS = {
    "ours (AT-EDM)": Way(page_rank, kernels.similarity_source, "similarity"),
    "ours, recovery by keys": Way(page_rank, _by_keys, "keys"),
    "by keys": Way(_rank_by_keys, _by_keys, "keys", BY_KEYS["grid"]),
}


def study(
    pipe: Any,
    cases: Sequence[PromptCase],
    ratio: float,
    sampling: Sampling,
    on_way: Callable[[str], None] = lambda name: None,
) -> list[dict[str, Any]]:
    """Make the pictures of ``cases`` in each of :data:`WAYS`, with DSAP, and watch every refill. Needs square maps.

    Returns:
        Flat rows, one per way and level, with means over blocks, steps and pictures. ``from_most_used``: fraction of
        the dropped tokens that the 5 % most used kept tokens refill. ``distance``: distance to the source, in tokens,
        on a map of side ``side``. ``key_cosine``: cosine between a dropped token's keys and its source's, all heads as
        one vector. ``kept_again``: fraction of the kept tokens that the previous step also kept (``kept`` is the value
        expected by chance).
    """
    rows = []
    for name, way in WAYS.items():
        on_way(name)
        for level, seen in sorted(_watched(pipe, way, cases, ratio, sampling).items()):
            means: dict[str, float] = {}
            for key in ("side", "kept", "from_most_used", "distance", "key_cosine", "kept_again"):
                values = [one[key] for one in seen if key in one]
                means[key] = sum(values) / len(values)
            rows.append({"name": name, "level": level, "pictures": len(cases), "ratio": ratio, **means})
    return rows


def _watched(
    pipe: Any, way: Way, cases: Sequence[PromptCase], ratio: float, sampling: Sampling
) -> dict[int, list[dict[str, float]]]:
    """Return the figures of every refill, by level."""
    levels = {block.name: block.level for block in attention_blocks(pipe.unet)}
    found: dict[int, list[dict[str, float]]] = defaultdict(list)
    before: dict[str, Tensor] = {}
    with RunningBlock(pipe.unet) as running:

        def ranking(q: Tensor, k: Tensor, lse: Tensor) -> Tensor:
            scores = way.rank(q, k, lse)
            tokens, side = q.shape[2], math.isqrt(q.shape[2])
            keep = kept_tokens(tokens, ratio)
            chosen_by = scores if way.grid is None else grid_first(scores, side, side, way.grid, keep)
            index = kernels.select_tokens(chosen_by, keep)
            seen = _described(k, index, way.find_sources(q, k, lse, index), side)
            kept = torch.zeros(q.shape[0], tokens, dtype=torch.bool).scatter(1, index.cpu(), True)
            if running.name in before:
                seen["kept_again"] = float((kept & before[running.name]).sum() / kept.sum())
            before[running.name] = kept
            found[levels[running.name]].append(seen)
            return scores

        with atedm.applied(pipe, PUBLISHED, ratio=ratio, ranking=ranking, recovery=way.recovery, grid=way.grid):
            run_without_decoding(pipe, cases, sampling)
    return found


def _described(k: Tensor, index: Tensor, source: Tensor, side: int) -> dict[str, float]:
    """Return the figures of one refill. ``k``: ``[B, H, N, D]``; ``index``: ``[B, K]``; ``source``: ``[B, N]``."""
    k, index, source = k.float().cpu(), index.cpu(), source.cpu()
    batch, keep = index.shape
    tokens = k.shape[2]
    dropped = torch.ones(batch, tokens, dtype=torch.bool).scatter(1, index, False)
    uses = torch.zeros(batch, keep).scatter_add(1, source, dropped.float())
    most = uses.sort(dim=1, descending=True).values[:, : max(1, round(HUB_FRACTION * keep))]
    origin = index.gather(1, source)  # for each token, the token that refills it
    place = torch.stack([torch.arange(tokens) // side, torch.arange(tokens) % side], dim=1).float()
    keys = F.normalize(k.transpose(1, 2).flatten(2), dim=2)
    cosine = (keys * keys.gather(1, origin[..., None].expand_as(keys))).sum(2)
    return {
        "side": side,
        "kept": keep / tokens,
        "from_most_used": float(most.sum() / uses.sum()),
        "distance": float((place - place[origin]).norm(dim=2)[dropped].mean()),
        "key_cosine": float(cosine[dropped].mean()),
    }
