"""The lab's random ranking."""

import torch

import atedm_kernels as kernels
from atedm_bench.rankings import RandomRanking


def attention(batch=2, heads=2, tokens=16, dim=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    q, k = (2 * torch.randn(batch, heads, tokens, dim, generator=generator) for _ in range(2))
    return q, k, kernels.attention_with_logsumexp(q, k, k)[1]


def test_random_ranking_is_seeded_and_uniform():
    ranking = RandomRanking(5)
    inputs = attention(tokens=400)
    first, second = ranking(*inputs), ranking(*inputs)
    assert first.shape == (2, 1, 400)
    assert not torch.equal(first, second)
    ranking.restart()
    assert torch.equal(ranking(*inputs), first)
    ranking.restart(6)
    assert not torch.equal(ranking(*inputs), first)
    assert abs(float(first.mean()) - 0.5) < 0.05
