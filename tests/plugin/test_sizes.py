"""Pictures of 512 to 2048 pixels a side, of every shape whose latent is whole."""

import math
import random

import pytest
import torch

import atedm
from atedm.app.models import SDXL_UNET, latent_size, meta_unet, unet_inputs
from atedm.policy.options import PUBLISHED
from tests.helpers.running import timesteps_of

SIDES = range(512, 2048 + 1, 8)
CORNERS = [(512, 512), (512, 2048), (2048, 512), (2048, 2048), (1024, 1024), (1920, 1080), (1000, 1304), (520, 2040)]
_draw = random.Random(0)
SIZES = [*CORNERS, *((_draw.choice(SIDES), _draw.choice(SIDES)) for _ in range(24))]


def tokens_of(width, height):
    """At levels 2 and 3: each halves both sides, rounding up."""
    return {math.prod(-(-side // scale) for side in latent_size(width, height)) for scale in (2, 4)}


@pytest.fixture(scope="module")
def sdxl():
    """SDXL's own UNet with fewer blocks and layers, without weights."""
    return meta_unet({**SDXL_UNET, "layers_per_block": 1, "transformer_layers_per_block": (1, 1, 2)}, torch.bfloat16)


@pytest.mark.parametrize(("width", "height"), SIZES)
def test_every_block_prunes_the_tokens_it_has(sdxl, width, height):
    ranked = []

    def rank(q, k, lse):
        ranked.append(q.shape[2])
        return torch.empty_like(lse)

    arguments, options = unet_inputs(sdxl, width=width, height=height)
    with torch.inference_mode(), atedm.applied(sdxl, PUBLISHED, schedule=None, ranking=rank):
        (sample,) = sdxl(*arguments, **options)
    assert sample.shape == arguments[0].shape
    assert len(ranked) == 7 and set(ranked) == tokens_of(width, height)


@pytest.mark.parametrize(("width", "height"), [(1920, 1080), (2048, 2048)])
def test_large_pictures_are_computed(make_unet, make_inputs, width, height):
    """As many tokens as SDXL has there, in a UNet of few channels and one block at level 2; both placements agree."""
    unet = make_unet(
        layers_per_block=1,
        block_out_channels=(8, 16, 32),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 2),
        attention_head_dim=1,
    )
    latent = latent_size(width, height)
    inputs = make_inputs(height=latent[0], width=latent[1], batch=1)

    def pruned(placement):
        with atedm.applied(unet, PUBLISHED, schedule=None, placement=placement), atedm.record(unet) as recording:
            sample = unet(**inputs).sample
        assert {ranked.tokens for ranked in recording.ranked} == tokens_of(width, height)
        return sample

    with torch.inference_mode():
        full, early, paper = unet(**inputs).sample, pruned("early"), pruned("paper")
    # A near tie decided otherwise changes a few pixels.
    assert (early - paper).norm() < 0.02 * (full - paper).norm()


@pytest.mark.parametrize("options", [{"schedule": None}, {"schedule": None, "recovery": "cached"}], ids=str)
def test_one_token_is_left_whole_and_that_is_said_once(unet, make_inputs, caplog, options):
    inputs = make_inputs(height=2, width=2)
    full = unet(**inputs).sample
    atedm.apply(unet, PUBLISHED, **options)
    for timestep in timesteps_of(2):
        unet(**{**inputs, "timestep": timestep})
    assert torch.equal(unet(**inputs).sample, full)
    assert len([message for message in caplog.messages if "keep all of its 1 tokens" in message]) == 1
