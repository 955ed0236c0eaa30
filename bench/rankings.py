"""Other ways to rank tokens: a random one as a baseline, and a cheaper one to study.

Each is a ``ranking`` for :func:`atedm.apply`: a function from ``q, k [B, H, N, D]`` and ``lse [B, H, N]`` to scores.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

import atedm_kernels as kernels


def page_rank(q: Tensor, k: Tensor, lse: Tensor) -> Tensor:
    """The default ranking as a function."""
    return kernels.weighted_page_rank(q, k, lse)[0]


def no_ranking(q: Tensor, k: Tensor, lse: Tensor) -> Tensor:
    """Equal scores at no cost, to count what everything but the ranking costs."""
    return q.new_zeros((q.shape[0], 1, q.shape[2]), dtype=torch.float32)


class RandomRanking:
    """Random scores, so any token may be dropped. Seeded; :meth:`restart` restarts the same series."""

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed
        self.restart()

    def restart(self) -> None:
        self.generator = torch.Generator().manual_seed(self.seed)

    def __call__(self, q: Tensor, k: Tensor, lse: Tensor) -> Tensor:
        scores = torch.rand(q.shape[0], 1, q.shape[2], generator=self.generator)
        return scores.to(q.device)


class PooledRanking:
    """Ranks square maps of ``tokens`` tokens on 2×2-pooled queries and keys: a sixteenth of the cost.

    Every token of a 2×2 cell gets the cell's score. Maps of other sizes are ranked as usual.
    """

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens

    def __call__(self, q: Tensor, k: Tensor, lse: Tensor) -> Tensor:
        batch, heads, tokens, _ = q.shape
        if tokens != self.tokens:
            return page_rank(q, k, lse)
        side = math.isqrt(tokens)
        if side * side != tokens or side % 2:
            raise ValueError(f"q has {tokens} tokens; expected a square map with even sides")

        def pooled(x: Tensor) -> Tensor:
            maps = x.transpose(2, 3).reshape(batch, -1, side, side)
            return F.avg_pool2d(maps, 2).view(batch, heads, x.shape[3], tokens // 4).transpose(2, 3).contiguous()

        q, k = pooled(q), pooled(k)
        _, lse = kernels.attention_with_logsumexp(q, k, k)
        scores = page_rank(q, k, lse).view(batch, heads, side // 2, side // 2)
        return F.interpolate(scores, scale_factor=2, mode="nearest").flatten(2)
