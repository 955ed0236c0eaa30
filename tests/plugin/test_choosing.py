"""Choices of tokens that serve several calls (``rank_every``)."""

import copy
import gc
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from diffusers import EulerDiscreteScheduler, HeunDiscreteScheduler

import atedm
from atedm.policy.options import PUBLISHED
from atedm.unet.memory import Picture, Slot
from atedm.unet.steps import step_of

RANKINGS = ["self", "cross", "keys", lambda q, k, lse: q.float().norm(dim=-1)]
rankings = pytest.mark.parametrize("ranking", RANKINGS, ids=["self", "cross", "keys", "function"])


@pytest.fixture
def unet(make_unet):
    """Every level and kind of block, in half the time."""
    return make_unet(layers_per_block=1)


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


def chooses(picture, place, kind="pruned", every=3):
    """Whether a call at ``place`` of seven chooses tokens."""
    picture.begin(place, 7)
    if picture.is_shared:
        return True
    ranks = picture.is_choice_due(place, kind, every)
    picture.slot = Slot(())
    picture.end(place, kind, place if ranks else picture.chosen, ranks)
    return ranks


@pytest.mark.parametrize(
    ("places", "expected"),
    [
        ([0, 1, 2, 3, 4], "x..x."),
        ([0, 0, 1, 1, 2, 2], "xxxxxx"),  # several calls per step: tiles, or halves of guidance one by one
        ([0, 1, 2, 2, 3, 4], "x..xxx"),  # from the step on that shows it
        ([5, 6, 0, 1, 2, 3], "x.x..x"),  # the same timesteps over again
        ([0, 1, 0, 1, 2, 2], "x.xxxx"),  # another picture with the same timesteps, in turn
        ([1, 3, 4], "xx."),  # after a step left out it may be another picture
        ([0, 2, 4, 6], "xx.x"),  # but not if every other step is left out
    ],
)
def test_every_third_step_and_the_first_of_a_picture(places, expected):
    picture = Picture()
    assert "".join(".x"[chooses(picture, place)] for place in places) == expected


def test_a_phase_begins_with_a_choice():
    picture = Picture()
    kinds = ["light", "light", "pruned", "pruned", "pruned"]
    assert [chooses(picture, n, kind, every=2) for n, kind in enumerate(kinds)] == [True, False, True, False, True]


@rankings
def test_a_choice_stays_for_the_steps_between(unet, inputs, ranking):
    scheduler = scheduler_of(10)
    atedm.apply(unet, PUBLISHED, scheduler=scheduler, ranking=ranking)
    anew = recorded(unet, unet, inputs, scheduler.timesteps)
    atedm.apply(unet, PUBLISHED, scheduler=scheduler, ranking=ranking, rank_every=3)
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


def memory_of(unet):
    return unet.get_submodule(atedm.pruned_blocks(unet)[0]).__dict__["forward"].calls.memory


def choices(unet, scheduler):
    """The kept tokens that are remembered of the picture with the timesteps of ``scheduler``, by block."""
    kept = memory_of(unet).picture(scheduler.timesteps.untyped_storage()).slot.blocks
    return {name: one.index.clone() for name, one in kept.items()}


def test_a_choice_serves_calls_that_compute_the_same_as_without(unet, inputs):
    scheduler = scheduler_of(4)
    timesteps = scheduler.timesteps
    atedm.apply(unet, PUBLISHED, schedule=None)
    expected = unet(**{**inputs, "timestep": timesteps[0]}).sample
    atedm.apply(unet, PUBLISHED, schedule=None, rank_every=2)
    assert torch.equal(unet(**{**inputs, "timestep": timesteps[0]}).sample, expected)
    stored = choices(unet, scheduler)
    assert list(stored) == atedm.pruned_blocks(unet)
    unet(**{**inputs, "sample": -inputs["sample"], "timestep": timesteps[1]})
    assert all(torch.equal(index, stored[name]) for name, index in choices(unet, scheduler).items())


def test_a_picture_is_forgotten_with_its_timesteps(unet, inputs):
    atedm.apply(unet, PUBLISHED, schedule=None, rank_every=3)
    for _ in range(8):
        scheduler = scheduler_of(3)
        for timestep in scheduler.timesteps[:2]:
            unet(**{**inputs, "timestep": timestep})
        assert len(memory_of(unet)) == 1
        del timestep
    atedm.remove(atedm.apply(unet, PUBLISHED, schedule=None, rank_every=3))
    del scheduler
    gc.collect()


def test_a_block_that_was_skipped_when_a_choice_was_due_chooses_when_it_runs_next(unet, inputs, monkeypatch):
    """As tools do that reuse deep features: what it holds is a choice of steps long past."""
    scheduler = scheduler_of(7)
    atedm.apply(unet, PUBLISHED, schedule=None, rank_every=3)
    forward = unet.mid_block.forward
    with atedm.record(unet) as recording:
        for step, timestep in enumerate(scheduler.timesteps):
            skipped = lambda hidden_states, *args, **kwargs: hidden_states  # noqa: E731
            monkeypatch.setattr(unet.mid_block, "forward", skipped if step == 3 else forward)
            unet(**{**inputs, "timestep": timestep})
    mid = [ranked.step for ranked in recording.ranked if "mid_block" in ranked.block and ranked.iterations is not None]
    assert mid == [0, 4, 6]


def test_two_pictures_in_turn_have_their_own_choices(unet, make_inputs):
    inputs = [make_inputs(seed=seed) for seed in (1, 2)]

    def run(n, scheduler, step):
        sample = inputs[n]["sample"] * (1 + step)
        return unet(**{**inputs[n], "sample": sample, "timestep": scheduler.timesteps[step]}).sample

    atedm.apply(unet, PUBLISHED, schedule=None, rank_every=3)
    alone = []
    for n in range(2):
        scheduler = scheduler_of(5 + n)
        alone.append([run(n, scheduler, step) for step in range(4)])
    schedulers = [scheduler_of(5), scheduler_of(6)]
    for step in range(4):
        for n in range(2):
            assert torch.equal(run(n, schedulers[n], step), alone[n][step])


def test_threads_that_share_a_unet_have_their_own_calls(unet_to_compile, make_inputs):
    unet = unet_to_compile
    inputs = [make_inputs(seed=seed) for seed in (1, 2)]

    def picture(n):
        scheduler = scheduler_of(8 - 3 * n)
        sample = inputs[n]["sample"].clone()
        for timestep in scheduler.timesteps:
            sample = sample + 0.1 * unet(**{**inputs[n], "sample": sample, "timestep": timestep}).sample
        return sample

    kinds = ["whole", "pruned", "reused", "pruned", "light", "reused"]
    remembered = {"schedule": kinds, "recovery": "cached", "staleness": "drift", "warm_start": True}
    for options in ({}, {"rank_every": 2}, {"schedule": None}, remembered):
        atedm.apply(unet, PUBLISHED, **options)
        alone = [picture(n) for n in range(2)]
        for _ in range(3):
            with ThreadPoolExecutor(2) as pool:
                together = list(pool.map(picture, range(2)))
            assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True)), options


UNKNOWN = {"int": 500, "copy": torch.tensor(500.0), "rising": torch.arange(1000.0)[500]}


@pytest.mark.parametrize("timestep", UNKNOWN.values(), ids=UNKNOWN)
def test_where_the_picture_is_unknown_every_call_chooses_and_says_so_once(unet, inputs, caplog, timestep):
    atedm.apply(unet, PUBLISHED, schedule=None, rank_every=4)
    kept = recorded(unet, unet, inputs, [timestep] * 3)
    assert all(ranked.iterations is not None for ranked in kept.values())
    assert (
        len([message for message in caplog.messages if "cannot tell which picture a call belongs to" in message]) == 1
    )


def pruned(unet):
    return [unet.get_submodule(name) for name in atedm.pruned_blocks(unet)]


def test_a_phase_and_an_image_begin_with_a_choice(unet, inputs):
    scheduler = scheduler_of(10)
    atedm.apply(unet, PUBLISHED, scheduler=scheduler, schedule=atedm.DSAP(0.1), rank_every=5)
    kept = recorded(unet, unet, inputs, [*scheduler.timesteps, *scheduler.timesteps])
    whole_at_first = "down_blocks.1.attentions.0"
    assert (0, whole_at_first) not in kept
    chosen = sorted({call for (call, _), ranked in kept.items() if ranked.iterations is not None})
    assert chosen == [0, 1, 6, 10, 11, 16]


def test_each_call_of_a_second_order_step_is_an_entry_of_the_timesteps(unet, inputs):
    scheduler = scheduler_of(4, HeunDiscreteScheduler)
    atedm.apply(unet, PUBLISHED, schedule=None, rank_every=2)
    kept = recorded(unet, unet, inputs, scheduler.timesteps)
    chosen = sorted({kept[key].step for key in kept if kept[key].iterations is not None})
    assert chosen == [0, 2, 4, 6]


def test_another_batch_or_size_chooses_anew(unet, make_inputs):
    scheduler = scheduler_of(4)
    atedm.apply(unet, PUBLISHED, scheduler=scheduler, schedule=None, rank_every=4)
    expected = {}
    for step, inputs in enumerate([make_inputs(), make_inputs(batch=1), make_inputs(height=24, batch=1)]):
        expected[step] = unet(**{**inputs, "timestep": scheduler.timesteps[step]}).sample
        with atedm.applied(unet, PUBLISHED, schedule=None):
            assert torch.equal(expected[step], unet(**{**inputs, "timestep": scheduler.timesteps[step]}).sample)


def test_another_shape_with_as_many_tokens_chooses_again(unet, make_inputs):
    scheduler = scheduler_of(4)
    sides = [{"height": 16, "width": 24}, {"height": 24, "width": 16}, {"height": 16, "width": 20}]
    for keep_multiple in (1, 32):
        atedm.apply(unet, PUBLISHED, schedule=None, rank_every=4, keep_multiple=keep_multiple)
        for step, size in enumerate(sides):
            call = {**make_inputs(**size), "timestep": scheduler.timesteps[step]}
            found = unet(**call).sample
            with atedm.applied(unet, PUBLISHED, schedule=None, keep_multiple=keep_multiple):
                assert torch.equal(found, unet(**call).sample)
        scheduler = scheduler_of(4)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference_mode"])
def test_steps_are_found_in_views_and_nothing_else(context):
    with context():
        timesteps = scheduler_of(6).timesteps
        for index, timestep in enumerate(timesteps):
            for view in (timestep, timestep.detach(), timestep.expand(2), timestep[None], timesteps[index]):
                step = step_of(view)
                assert (step.index, step.total) == (index, 6) and step.picture is timesteps.untyped_storage()
        constant, batch = torch.full((4,), 500.0), torch.tensor([900.0, 800.0])
        for other in (timesteps[1].clone(), timesteps[1].double(), constant[1], batch, batch.expand(2, 2), 3, None):
            step = step_of(other)
            assert (step.index, step.picture) == (None, None)
        assert step_of(torch.ones(3, dtype=torch.complex64)[1]).index is None


def test_a_unet_that_another_one_calls_ends_its_own_call_alone(make_unet, inputs):
    outer, inner = make_unet(), make_unet(seed=1)
    atedm.apply(outer, PUBLISHED)
    scheduler = scheduler_of(10)
    call = {**inputs, "timestep": scheduler.timesteps[0]}
    expected = outer(**call).sample
    for options in ({"schedule": None}, {}):
        atedm.apply(inner, PUBLISHED, **options)
        hook = outer.mid_block.register_forward_pre_hook(lambda *_: inner(**call) and None)
        with atedm.record(outer) as recording:
            assert torch.equal(outer(**call).sample, expected)
        hook.remove()
        assert len(recording.ranked) == 7


def test_an_interrupted_call_leaves_nothing_running(unet, inputs):
    def interrupt(*_):
        raise KeyboardInterrupt

    atedm.apply(unet, PUBLISHED, schedule=None)
    with atedm.record(unet) as recording:
        hook = unet.mid_block.register_forward_pre_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            unet(**inputs)
        hook.remove()
    seen = len(recording.ranked)
    unet(**inputs)
    assert len(recording.ranked) == seen


def test_a_copy_has_no_choice_of_the_originals(unet, inputs):
    scheduler = scheduler_of(4)
    atedm.apply(unet, PUBLISHED, schedule=None, rank_every=2)
    unet(**{**inputs, "timestep": scheduler.timesteps[0]})
    assert len(memory_of(unet)) == 1 and len(memory_of(copy.deepcopy(unet))) == 0
