"""The lab's other rankings: random, shared, pooled and reused."""

import pytest
import torch

import atedm_kernels as kernels
from atedm.bench.quality.rankings import PooledRanking, RandomRanking, ReusedRanking, page_rank, shared_between_halves


class Running:
    name = "block"


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


def test_shared_ranking_is_the_conditional_halfs():
    q, k, lse = attention(batch=4)
    scores = shared_between_halves(q, k, lse)
    expected = page_rank(q[2:], k[2:], lse[2:])
    assert torch.equal(scores[:2], expected)
    assert torch.equal(scores[2:], expected)
    with pytest.raises(ValueError, match="3 rows"):
        shared_between_halves(*(x[:3] for x in (q, k, lse)))


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


def test_reused_ranking_ranks_anew_at_every_third_call_of_a_block():
    running, asked = Running(), []

    def ranking(q, k, lse):
        asked.append(running.name)
        return page_rank(q, k, lse)

    reused = ReusedRanking(running, 3, ranking)
    calls = [attention(seed=n) for n in range(7)]
    for inputs in calls:
        for running.name in ("a", "b"):
            reused(*inputs)
    assert asked == ["a", "b"] * 3
    running.name = "a"
    assert torch.equal(reused(*calls[0]), page_rank(*calls[6]))
    reused.restart()
    assert torch.equal(reused(*calls[0]), page_rank(*calls[0]))
