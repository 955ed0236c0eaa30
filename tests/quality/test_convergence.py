"""How fast the ranking converges, and where it starts."""

import torch

from atedm_bench.quality import convergence


def test_a_start_at_the_ranking_before_goes_on_from_its_scores():
    q, k = torch.randn(2, 2, 4, 60, 8, generator=torch.Generator().manual_seed(0)) * 2
    lse = (q @ k.mT * 8**-0.5).logsumexp(-1)
    seen, before = [convergence._Seen(), convergence._Seen()], {}
    for each in seen:
        convergence._observe(q, k, lse, 20, each, before)
    assert not seen[0].warm
    for warm, cold in ((1, 6), (3, 8), (5, 10)):  # of the same map, after the 5 of the first time
        (overlap,) = seen[1].warm[warm]
        assert torch.equal(overlap, seen[1].jaccard[cold][0])
    assert seen[1].warm[3][0].mean() > seen[1].jaccard[3][0].mean()
