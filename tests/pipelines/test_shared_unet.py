"""Several pipelines around one UNet, and copies: each call follows the pipeline that makes it."""

import copy

import diffusers
import pytest
import torch

import atedm
from atedm.policy.options import PUBLISHED
from tests.helpers.running import latents

PROMPTS = ["a red circle", "a green star"]


@pytest.fixture
def other(base):
    """Another pipeline around ``base``'s UNet, with a scheduler of its own."""
    pipe = diffusers.StableDiffusionXLPipeline.from_pipe(base)
    pipe.scheduler = copy.deepcopy(base.scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(params=["from_pipe", "deepcopy"])
def second(request, base, other):
    """Makes a second pipeline, from one that is pruned."""
    if request.param == "from_pipe":
        return lambda: other
    return lambda: copy.deepcopy(base)


def test_the_second_pipeline_has_its_own_steps(base, second):
    with atedm.applied(base, PUBLISHED, ratio=0.5):
        latents(base, num_inference_steps=2)
        pipe = second()
        pipe.scheduler = diffusers.DDIMScheduler.from_config(base.scheduler.config, beta_schedule="scaled_linear")
        with atedm.record(pipe) as recording:
            latents(pipe, num_inference_steps=10)
    assert recording.calls == list(range(10))


def test_a_choice_for_several_steps_serves_one_picture(base, picture):
    pipe = diffusers.StableDiffusionXLImg2ImgPipeline.from_pipe(base)
    pipe.set_progress_bar_config(disable=True)

    def last_step():
        return latents(pipe, image=picture, strength=0.25)

    with atedm.applied(base, PUBLISHED, ratio=0.5, rank_every=4, schedule=None):
        alone = last_step()
        latents(base)  # ends at the step that the other begins with
        assert torch.equal(last_step(), alone)
        latents(base, callback_on_step_end=interrupt_before_last)  # ends at the step before
        assert torch.equal(last_step(), alone)


def interrupt_before_last(pipe, step, timestep, tensors):
    pipe._interrupt = step >= 2
    return tensors
