"""The lab's other rankings: random and pooled."""

import torch

import atedm_kernels as kernels
from atedm_bench.rankings import PooledRanking, RandomRanking, page_rank


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
    assert abs(float(first.mean()) - 0.5) < 0.05


def test_pooled_ranking_of_a_map_of_equal_cells_orders_cells_as_the_full_one_does():
    q, k, _ = attention(tokens=16, seed=3)

    def spread(x):  # every token of a 4 × 4 map four times, as a 2 × 2 cell of an 8 × 8 one
        maps = x.transpose(2, 3).reshape(2, 2, 8, 4, 4)
        return maps.repeat_interleave(2, 3).repeat_interleave(2, 4).reshape(2, 2, 8, 64).transpose(2, 3).contiguous()

    q, k = spread(q), spread(k)
    lse = kernels.attention_with_logsumexp(q, k, k)[1]
    pooled, full = PooledRanking(64)(q, k, lse), page_rank(q, k, lse)
    # A cell's score is shared by its four tokens.
    torch.testing.assert_close(pooled / 4, full, rtol=2e-3, atol=1e-6)


def test_pooled_ranking_leaves_other_maps_alone():
    inputs = attention(tokens=16)
    assert torch.equal(PooledRanking(64)(*inputs), page_rank(*inputs))
