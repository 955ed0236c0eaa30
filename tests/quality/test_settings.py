"""The settings that ``atedm-bench quality`` compares, at the FLOPs that they are compared at."""

import dataclasses

import pytest

from atedm.policy.options import PUBLISHED
from atedm_bench.methods import Costs
from atedm_bench.quality.claims import CLAIMS
from atedm_bench.quality.samplers import timesteps_of
from atedm_bench.quality.session import flops_of
from atedm_bench.quality.settings import BUDGETS, Plan
from tests.helpers.shallow import shallow_pipeline


def test_the_published_method_and_its_ablations_at_their_flops():
    pipe = shallow_pipeline(layers=(1, 2, 3))  # two of the budgets are within reach
    side = pipe.unet.config.sample_size * pipe.vae_scale_factor
    counter = flops_of(pipe, side, side)
    costs = Costs(counter, timesteps_of(pipe, 25))
    plan = Plan(costs)
    names = [name for group in plan.groups.values() for name in group]
    assert {name for claim in CLAIMS for pair in claim.pairs for name in pair} <= set(names)
    found = {s.name: s for s in plan.settings(["ours b", "ours c", "tomesd c", "random c", "ablation"])}
    full = counter.full().unet

    def flops(name):
        method = found[name].method
        return method.flops(costs, method.options.kinds_of(25) if method.records else method.kinds(costs))

    for budget in "bc":
        options = found[f"ours {budget}"].method.options
        assert counter.of_kind(options, "pruned").unet / full == pytest.approx(BUDGETS[budget], rel=0.01)
        assert options == dataclasses.replace(PUBLISHED, ratio=options.ratio)
    assert flops("tomesd c").unet == pytest.approx(flops("ours c").unet, rel=0.02)
    assert flops("random c").unet == flops("ours c").unet
    for name in ("DSAP off", "level 2 whole"):
        assert found[name].note or flops(name).unet == pytest.approx(flops("ours c").unet, rel=0.01)
    for name in ("recovery: zeros", "recovery: bicubic", "recovery: keys", "ranking: cross-attention"):
        assert found[name].method.options.ratio == found["ours c"].method.options.ratio
    # PageRank's iterations beside the source map, and the source map alone.
    assert flops("ours c").scoring > 2 * flops("random c").scoring > 0
