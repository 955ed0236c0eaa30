"""The embedded model's parts, small, in every pipeline that diffusers has for them."""

import numpy as np
import pytest
from PIL import Image

import atedm
from tests.helpers.shallow import shallow_pipeline


@pytest.fixture(scope="session")
def base():
    """Fewer layers, pictures of 64 pixels. Session-wide: what a test applies it removes."""
    return shallow_pipeline(side=64)


@pytest.fixture(autouse=True)
def nothing_left(base):
    yield
    assert atedm.pruned_blocks(base) == []
    assert all("forward" not in module.__dict__ for module in base.unet.modules())


@pytest.fixture(scope="session")
def picture(base):
    """A picture of the native size."""
    side = base.unet.config.sample_size * base.vae_scale_factor
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (side, side, 3), dtype=np.uint8))
