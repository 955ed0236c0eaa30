"""Choices of tokens that serve several calls (``rank_every``) or both halves of guidance (``share_guidance``)."""

import copy

import pytest
import torch
from diffusers import EulerDiscreteScheduler, HeunDiscreteScheduler

import atedm
from atedm.schedule import RankingPeriod

RANKINGS = ["self", "cross", "keys", lambda q, k, lse: q.float().norm(dim=-1)]
rankings = pytest.mark.parametrize("ranking", RANKINGS, ids=["self", "cross", "keys", "function"])


class Pipeline:
    """The part of a pipeline that is asked for."""

    do_classifier_free_guidance = False

    def __init__(self, unet, scheduler):
        self.unet, self.scheduler = unet, scheduler


def scheduler_of(steps, kind=EulerDiscreteScheduler):
    scheduler = kind()
    scheduler.set_timesteps(steps)
    return scheduler


def recorded(target, unet, inputs, timesteps):
    """What was kept in each call, each with an input of its own."""
    generator = torch.Generator().manual_seed(0)
    with atedm.record(target) as recording:
        for t in timesteps:
            sample = torch.randn(inputs["sample"].shape, generator=generator)
            unet(**{**inputs, "sample": sample, "timestep": t})
    return {(ranked.call, ranked.block): ranked for ranked in recording.ranked}


TIMESTEPS = [torch.zeros(9), torch.zeros(9)]  # of two pictures


@pytest.mark.parametrize(
    ("places", "calls", "expected"),
    [
        ([0, 1, 2, 3, 4], 1, "x..x."),
        ([0, 0, 1, 1, 2, 2, 3, 3], 2, "xx....xx"),  # two calls a step
        ([0, 0, 1, 1, 2, 2], 1, "xxxxxx"),  # two contents a step
        ([5, 6, 0, 1, 2, 3], 1, "x.x..x"),  # the same timesteps over again
        ([5, 5, 7, 8], 2, "xxx."),  # a step left out
    ],
)
def test_every_third_step_and_the_first_of_a_picture(places, calls, expected):
    period = RankingPeriod(3)
    assert "".join(".x"[period.is_due(place, False, TIMESTEPS[0], calls)] for place in places) == expected


def test_a_picture_with_timesteps_of_its_own_begins_with_a_choice():
    period = RankingPeriod(3)
    calls = [(0, 0), (0, 1), (1, 2), (1, 3), (0, 3), (0, 3), (1, 3)]  # the last ones come several a step
    assert [period.is_due(place, False, TIMESTEPS[n]) for n, place in calls] == [1, 0, 1, 0, 1, 1, 1]


def test_a_phase_begins_with_a_choice_and_values_need_only_grow():
    period = RankingPeriod(2)
    places = [(-999, True), (-900, True), (-850, False), (-700, False), (-650, False), (-999, True), (-990, True)]
    assert [period.is_due(*place) for place in places] == [True, False, True, False, True, True, False]


@rankings
def test_a_choice_stays_for_the_steps_between(unet, inputs, ranking):
    scheduler = scheduler_of(10)
    atedm.apply(unet, scheduler=scheduler, ranking=ranking)
    anew = recorded(unet, unet, inputs, scheduler.timesteps)
    atedm.apply(unet, scheduler=scheduler, ranking=ranking, rank_every=3)
    kept = recorded(unet, unet, inputs, scheduler.timesteps)
    assert kept.keys() == anew.keys()
    changed = 0
    for (call, block), ranked in kept.items():
        # DSAP's light phase is steps 0 to 2: the choices at 0, 3, 6 and 9 serve the others.
        chosen = kept[call // 3 * 3, block]
        assert torch.equal(ranked.index, chosen.index) and torch.equal(ranked.scores, chosen.scores)
        assert (ranked.call, ranked.step) == (call, call)
        assert (ranked.iterations is not None) == (ranking in ("self", "cross") and call % 3 == 0)
        changed += not torch.equal(ranked.index, anew[call, block].index)
    assert changed


def test_a_choice_serves_calls_that_compute_the_same_as_without(unet, inputs):
    timesteps = torch.tensor([900.0, 800.0])
    atedm.apply(unet, schedule=None)
    expected = unet(**{**inputs, "timestep": timesteps[0]}).sample
    atedm.apply(unet, schedule=None, rank_every=2)
    assert torch.equal(unet(**{**inputs, "timestep": timesteps[0]}).sample, expected)
    stored = [patch.kept.index.clone() for patch in (module.__dict__["forward"] for module in pruned(unet))]
    unet(**{**inputs, "sample": -inputs["sample"], "timestep": timesteps[1]})
    assert all(torch.equal(a, b.__dict__["forward"].kept.index) for a, b in zip(stored, pruned(unet), strict=True))


def pruned(unet):
    return [unet.get_submodule(name) for name in atedm.pruned_blocks(unet)]


def test_a_phase_and_an_image_begin_with_a_choice(unet, inputs):
    scheduler = scheduler_of(10)
    atedm.apply(unet, scheduler=scheduler, schedule=atedm.DSAP(0.1), rank_every=5)
    kept = recorded(unet, unet, inputs, [*scheduler.timesteps, *scheduler.timesteps])
    whole_at_first = "down_blocks.1.attentions.0"
    assert (0, whole_at_first) not in kept
    chosen = sorted({call for (call, _), ranked in kept.items() if ranked.iterations is not None})
    assert chosen == [0, 1, 6, 10, 11, 16]


def test_both_calls_of_a_second_order_step_are_alike(unet, inputs):
    scheduler = scheduler_of(4, HeunDiscreteScheduler)
    atedm.apply(unet, scheduler=scheduler, schedule=None, rank_every=2)
    kept = recorded(unet, unet, inputs, scheduler.timesteps)
    chosen = sorted({kept[key].step for key in kept if kept[key].iterations is not None})
    assert chosen == [0, 2]


def test_another_batch_or_size_chooses_anew(unet, make_inputs):
    scheduler = scheduler_of(4)
    atedm.apply(unet, scheduler=scheduler, schedule=None, rank_every=4)
    expected = {}
    for step, inputs in enumerate([make_inputs(), make_inputs(batch=1), make_inputs(height=24, batch=1)]):
        expected[step] = unet(**{**inputs, "timestep": scheduler.timesteps[step]}).sample
        with atedm.applied(unet, schedule=None):
            assert torch.equal(expected[step], unet(**{**inputs, "timestep": scheduler.timesteps[step]}).sample)


def test_a_copy_has_no_choice_of_the_originals(unet, inputs):
    atedm.apply(unet, schedule=None, rank_every=2)
    unet(**{**inputs, "timestep": 900})
    assert all(module.__dict__["forward"].kept is None for module in pruned(copy.deepcopy(unet)))


@rankings
def test_halves_share_the_conditional_halfs_choice(unet, make_inputs, ranking):
    inputs = make_inputs(batch=4)
    atedm.apply(unet, schedule=None, ranking=ranking)
    own = recorded(unet, unet, inputs, [500])
    atedm.apply(unet, schedule=None, ranking=ranking, share_guidance=True)
    shared = recorded(unet, unet, inputs, [500])
    first = min(shared, key=list(shared).index)  # only its input is the same in both
    assert torch.equal(shared[first].index[2:], own[first].index[2:])
    assert not torch.equal(shared[first].index[:2], own[first].index[:2])
    for ranked in shared.values():
        assert torch.equal(ranked.index[:2], ranked.index[2:])
        assert ranked.scores.shape[0] == 4 and torch.equal(ranked.scores[:2], ranked.scores[2:])
        assert ranked.iterations is None or ranked.iterations.shape[0] == 4
    with pytest.raises(ValueError, match="share_guidance is set, but the batch has 3 rows"):
        unet(**make_inputs(batch=3))


def test_without_guidance_nothing_is_shared(unet, inputs):
    pipe = Pipeline(unet, scheduler_of(4))
    atedm.apply(pipe, schedule=None)
    expected = unet(**inputs).sample
    atedm.apply(pipe, schedule=None, share_guidance=True)
    assert torch.equal(unet(**inputs).sample, expected)
    pipe.do_classifier_free_guidance = True
    assert not torch.equal(unet(**inputs).sample, expected)


def test_perturbed_guidance_has_no_two_halves(unet, make_inputs):
    from diffusers.models.attention_processor import PAGCFGIdentitySelfAttnProcessor2_0

    unet.down_blocks[1].attentions[0].transformer_blocks[0].attn1.processor = PAGCFGIdentitySelfAttnProcessor2_0()
    atedm.apply(unet, schedule=None, share_guidance=True)
    with pytest.raises(ValueError, match="share_guidance is set; expected False with perturbed"):
        unet(**make_inputs(batch=6))
