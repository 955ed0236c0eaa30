"""DSAP leaves exactly the right blocks whole at each denoising step."""

import types

import diffusers
import pytest
import torch

import atedm
from atedm.policy.options import PUBLISHED
from atedm.unet.steps import step_of

WHOLE_WHEN_LIGHT = {
    "down_blocks.1.attentions.0",
    "down_blocks.2.attentions.0",
    "up_blocks.0.attentions.2",
    "up_blocks.1.attentions.2",
}


class Pipeline:
    def __init__(self, unet, scheduler):
        self.unet, self.scheduler = unet, scheduler


def pipeline(unet, scheduler, steps=50):
    scheduler.set_timesteps(steps)
    return Pipeline(unet, scheduler)


def whole_blocks(pipe, inputs, timesteps):
    """For each timestep, the blocks left whole in the UNet call."""
    everything = set(atedm.pruned_blocks(pipe))
    whole = []
    for timestep in timesteps:
        with atedm.record(pipe) as recording:
            pipe.unet(**{**inputs, "timestep": timestep})
        whole.append(everything - {ranked.block for ranked in recording.ranked})
    return whole


def phases(pipe, inputs, timesteps):
    whole = whole_blocks(pipe, inputs, timesteps)
    assert all(blocks in (set(), WHOLE_WHEN_LIGHT) for blocks in whole)
    return [bool(blocks) for blocks in whole]


@pytest.fixture
def small(make_inputs):
    return make_inputs(batch=1, height=8, width=8)


def test_the_papers_fifteen_of_fifty(unet, small):
    pipe = atedm.apply(pipeline(unet, diffusers.EulerDiscreteScheduler()), PUBLISHED)
    assert phases(pipe, small, pipe.scheduler.timesteps) == [True] * 15 + [False] * 35


@pytest.mark.parametrize(
    "scheduler",
    [
        diffusers.DDIMScheduler,
        diffusers.DPMSolverMultistepScheduler,
        diffusers.EulerAncestralDiscreteScheduler,
        diffusers.UniPCMultistepScheduler,
    ],
)
def test_other_schedulers(unet, small, scheduler):
    pipe = atedm.apply(pipeline(unet, scheduler(), steps=10), PUBLISHED)
    assert phases(pipe, small, pipe.scheduler.timesteps) == [True] * 3 + [False] * 7


def test_image_to_image_starts_late(unet, small):
    pipe = atedm.apply(pipeline(unet, diffusers.EulerDiscreteScheduler(), steps=20), PUBLISHED)
    timesteps = pipe.scheduler.timesteps[4:]  # strength 0.8: steps 4 to 19, of which 4 and 5 are light
    assert phases(pipe, small, timesteps) == [True] * 2 + [False] * 14


@pytest.mark.parametrize("scheduler", [diffusers.HeunDiscreteScheduler, diffusers.KDPM2DiscreteScheduler])
def test_schedulers_that_call_the_model_twice_a_step(unet, small, scheduler):
    pipe = atedm.apply(pipeline(unet, scheduler(), steps=10), PUBLISHED)
    assert len(pipe.scheduler.timesteps) == 19
    assert phases(pipe, small, pipe.scheduler.timesteps) == [True] * 6 + [False] * 13


@pytest.mark.parametrize(("steps", "light"), [(1, 1), (2, 1), (4, 2), (8, 3)])
def test_few_steps(unet, small, steps, light):
    pipe = atedm.apply(pipeline(unet, diffusers.LCMScheduler(), steps=steps), PUBLISHED)
    assert phases(pipe, small, pipe.scheduler.timesteps) == [True] * light + [False] * (steps - light)


def test_an_exchanged_scheduler_is_followed(unet, small):
    pipe = atedm.apply(pipeline(unet, diffusers.EulerDiscreteScheduler()), PUBLISHED)
    pipe.scheduler = diffusers.DDIMScheduler()
    pipe.scheduler.set_timesteps(4)
    assert phases(pipe, small, pipe.scheduler.timesteps) == [True, True, False, False]


def test_copied_timesteps_are_found_by_value(unet, small):
    pipe = atedm.apply(pipeline(unet, diffusers.EulerDiscreteScheduler(), steps=10), PUBLISHED)
    as_numbers = [float(t) for t in pipe.scheduler.timesteps]
    as_batches = [t.repeat(1).clone() for t in pipe.scheduler.timesteps]
    expected = [True] * 3 + [False] * 7
    assert phases(pipe, small, as_numbers) == expected
    assert phases(pipe, small, as_batches) == expected


def test_repeated_timesteps_by_value_follow_the_scheduler():
    scheduler = diffusers.HeunDiscreteScheduler()
    scheduler.set_timesteps(10)
    sample = torch.zeros(1, 4, 8, 8)
    steps = []
    for timestep in scheduler.timesteps:
        sample = scheduler.scale_model_input(sample, timestep)
        steps.append(step_of(timestep.clone(), scheduler))
        sample = scheduler.step(torch.zeros_like(sample), timestep, sample).prev_sample
    assert [(step.index, step.total) for step in steps] == [(i, 19) for i in range(19)]
    assert not any(step.picture for step in steps)


def test_without_a_scheduler_the_timestep_decides(unet, small):
    atedm.apply(unet, PUBLISHED)
    pipe = types.SimpleNamespace(unet=unet)
    assert phases(pipe, small, [999, 701, 699, 1]) == [True, True, False, False]
    copies = [torch.tensor(value) for value in (999.0, 701.0, 699.0)]
    assert phases(pipe, small, copies) == [True, True, False]
    rising = torch.arange(1000.0)
    assert phases(pipe, small, [rising[999], rising[701], rising[699]]) == [True, True, False]


def test_a_scheduler_can_be_given_with_a_unet(unet, small):
    scheduler = diffusers.EulerDiscreteScheduler()
    scheduler.set_timesteps(4)
    atedm.apply(unet, PUBLISHED, scheduler=scheduler)
    assert phases(types.SimpleNamespace(unet=unet), small, scheduler.timesteps) == [True, True, False, False]
    with pytest.raises(ValueError, match="scheduler is given with a pipeline"):
        atedm.apply(Pipeline(unet, scheduler), PUBLISHED, scheduler=scheduler)


def test_no_schedule_prunes_at_every_step(unet, small):
    atedm.apply(unet, PUBLISHED, schedule=None)
    assert phases(types.SimpleNamespace(unet=unet), small, [999, 1]) == [False, False]


def test_constant_phases_read_no_timestep(unet, small):
    everything = set(atedm.pruned_blocks(atedm.apply(unet, PUBLISHED)))
    for fraction, whole in ((0, set()), (1, WHOLE_WHEN_LIGHT)):
        atedm.apply(unet, PUBLISHED, schedule=atedm.DSAP(fraction))
        assert phases(types.SimpleNamespace(unet=unet), small, [999, 1]) == [False, False]
        # Those that are always whole are not pruned at all.
        assert everything - set(atedm.pruned_blocks(unet)) == whole


def test_a_wrapper_that_is_no_pipeline_is_passed_over(unet, small):
    class Wrapper:
        def __init__(self):
            self.unet = unet

        def __call__(self, timestep):
            return self.unet(**{**small, "timestep": timestep}).sample

    pipe = atedm.apply(pipeline(unet, diffusers.EulerDiscreteScheduler(), steps=10), PUBLISHED)
    with atedm.record(pipe) as recording:
        for timestep in pipe.scheduler.timesteps:
            Wrapper()(timestep)
    assert recording.calls == list(range(10))


def test_levels_left_alone_stay_so(unet, small):
    pipe = atedm.apply(pipeline(unet, diffusers.EulerDiscreteScheduler(), steps=2), PUBLISHED, levels=(3,))
    whole = whole_blocks(pipe, small, pipe.scheduler.timesteps)
    assert whole == [{"down_blocks.2.attentions.0", "up_blocks.0.attentions.2"}, set()]


def test_fractions_are_checked():
    with pytest.raises(ValueError, match=r"fraction is 1\.5"):
        atedm.DSAP(1.5)


def test_a_copy_of_the_unet_does_not_take_the_pipeline_along(unet, small):
    import copy

    pipe = atedm.apply(pipeline(unet, diffusers.EulerDiscreteScheduler()), PUBLISHED)
    twin = copy.deepcopy(pipe.unet)
    assert phases(types.SimpleNamespace(unet=twin), small, [999, 1]) == [True, False]


def test_a_copied_pipeline_follows_its_own_scheduler(unet, small):
    import copy

    scheduler = diffusers.DPMSolverMultistepScheduler(use_karras_sigmas=True)
    twin = copy.deepcopy(atedm.apply(pipeline(unet, scheduler, steps=4), PUBLISHED))
    twin.scheduler.set_timesteps(20)  # by value, one more of these would be light
    assert phases(twin, small, twin.scheduler.timesteps) == [True] * 6 + [False] * 14
