"""The kinds that schedules name: which may be, what they read of the past, and what a recording gives back."""

import pytest
import torch

import atedm
from atedm.policy.options import PUBLISHED
from tests.helpers.running import timesteps_of


@pytest.fixture
def unet(make_unet):
    return make_unet(layers_per_block=1)


class Named(atedm.Schedule):
    def __init__(self, kind, kinds=("whole", "pruned")):
        self._kind, self._kinds = kind, kinds

    @property
    def kinds(self):
        return frozenset(self._kinds)

    def kind(self, progress):
        return self._kind(progress)


@torch.no_grad()
def run(unet, inputs, timesteps, since=0, until=None):
    for n, t in enumerate(timesteps[:until]):
        if n >= since:
            unet(**{**inputs, "timestep": t})


@pytest.mark.parametrize("kind", ["prune", "reused", None])
def test_a_kind_that_a_schedule_does_not_announce_is_refused(unet, inputs, kind):
    atedm.apply(unet, PUBLISHED, schedule=Named(lambda _: kind))
    with pytest.raises(ValueError, match=rf"names step 0 {kind!r}; expected one of its kinds: 'pruned', 'whole'"):
        run(unet, inputs, timesteps_of(4))
    atedm.apply(unet, PUBLISHED, schedule=Named(lambda _: kind))
    with pytest.raises(ValueError, match=rf"names timestep 500 {kind!r}"):
        unet(**inputs)


def test_a_schedule_that_reads_the_past_is_given_it_where_nothing_else_is_remembered(unet, inputs):
    by_turns = Named(lambda progress: "whole" if len(progress.kinds) % 2 == 0 else "pruned")
    for schedule, total, expected in (
        (by_turns, 6, "wpwpwp"),
        (atedm.Adaptive(0.3, max_gap=1, pruned_from=0.3), 14, "wwwwwpwpwpwpwp"),
    ):
        atedm.apply(unet, PUBLISHED, schedule=schedule)
        with atedm.record(unet) as recording:
            run(unet, inputs, timesteps_of(total))
        assert "".join(kind[0] for kind in recording.kinds) == expected
        assert {ranked.call for ranked in recording.ranked} == {n for n, kind in enumerate(expected) if kind == "p"}


def test_an_adaptive_schedule_without_gaps_is_known_beforehand():
    assert atedm.Adaptive(0.3, max_gap=1).planned(5) == ["whole"] * 5
    options = atedm.Options(schedule=atedm.Adaptive(0.3, max_gap=1, pruned_from=0.5))
    assert options.kinds_of(14) == ["whole"] * 7 + ["pruned", "whole"] * 3 + ["pruned"]
    assert options.kinds == {"whole", "pruned"}
    assert atedm.Options(schedule=atedm.Adaptive(0.3, max_gap=1)).is_constant


def test_a_recording_gives_back_the_kinds_of_its_last_run(unet, inputs):
    fixed = ["whole", "reused", "pruned", "reused"]
    atedm.apply(unet, PUBLISHED, schedule=fixed, recovery="cached")
    with atedm.record(unet, tokens=False) as recording:
        run(unet, inputs, timesteps_of(4))
        run(unet, inputs, timesteps_of(4), since=3)  # as image-to-image does
        assert recording.schedule() == ["whole"] * 4
        run(unet, inputs, timesteps_of(8), until=5)  # broken off
        run(unet, inputs, timesteps_of(8), since=6)
        assert recording.schedule() == ["whole"] * 6 + ["whole", "reused"]
        first, second = timesteps_of(4), timesteps_of(4)
        with torch.no_grad():
            for n in range(4):  # by turns
                unet(**{**inputs, "timestep": first[n]})
                if n < 2:
                    unet(**{**inputs, "timestep": second[n]})
    assert recording.schedule() == fixed


def test_that_all_steps_were_whole_is_said_of_whole_runs_alone(unet, make_inputs, caplog):
    atedm.apply(unet, PUBLISHED, schedule=atedm.Every(2))
    timesteps = timesteps_of(4)
    run(unet, make_inputs(), timesteps, until=3)
    run(unet, make_inputs(batch=1), timesteps, since=3)  # a shape that begins with the last step
    assert not caplog.messages
    run(unet, make_inputs(), timesteps_of(4), since=3)
    assert ["all 1 steps of a picture were computed whole" in message for message in caplog.messages] == [True]


@pytest.mark.parametrize("name", ["down_blocks.1.resnets.0", "mid_block.attentions.0", "up_blocks.0.upsamplers.0"])
@pytest.mark.parametrize("is_before", [False, True])
def test_what_a_reused_step_leaves_out_must_be_diffusers_own(unet, inputs, name, is_before):
    part = unet.get_submodule(name)
    own = part.forward

    def counting(*args, **kwargs):
        return own(*args, **kwargs)

    def put_on():
        part.forward = counting

    expected = rf"forward of {name} has been replaced|{name} can no longer be reused|{name} cannot be pruned"
    if is_before:
        put_on()
        with pytest.raises(ValueError, match=expected):
            atedm.apply(unet, PUBLISHED, schedule=atedm.Every(2))
    else:
        atedm.apply(unet, PUBLISHED, schedule=atedm.Every(2))
        put_on()
        with pytest.raises(ValueError, match=expected):
            run(unet, inputs, timesteps_of(4))
    del part.forward
    atedm.apply(unet, PUBLISHED, schedule=atedm.Every(2))
    run(unet, inputs, timesteps_of(4))
