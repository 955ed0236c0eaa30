"""More ways to rank tokens: PageRank as a function, equal scores for counting FLOPs, and random scores as a baseline.

Each is a ``ranking`` for :func:`atedm.apply`: a function from ``q, k [B, H, N, D]`` and ``lse [B, H, N]`` to scores.
"""

from __future__ import annotations

import torch
from torch import Tensor

import atedm_kernels as kernels


def page_rank(q: Tensor, k: Tensor, lse: Tensor) -> Tensor:
    """The default ranking as a function."""
    return kernels.weighted_page_rank(q, k, lse)[0]


def no_ranking(q: Tensor, k: Tensor, lse: Tensor) -> Tensor:
    """Return equal scores at no cost, to count what everything except the ranking costs."""
    return q.new_zeros((q.shape[0], 1, q.shape[2]), dtype=torch.float32)


class RandomRanking:
    """Random scores, so any token may be dropped. Seeded: :meth:`restart` begins the same series again, or another."""

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed
        self.restart()

    def restart(self, seed: int | None = None) -> None:
        self.seed = self.seed if seed is None else seed
        self.generator = torch.Generator().manual_seed(self.seed)

    def __call__(self, q: Tensor, k: Tensor, lse: Tensor) -> Tensor:
        scores = torch.rand(q.shape[0], 1, q.shape[2], generator=self.generator)
        return scores.to(q.device)
