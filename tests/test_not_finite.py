"""A picture that is not finite is an error, and all others are the pipeline's own."""

import math

import numpy as np
import pytest
from diffusers.models.autoencoders.vae import Decoder
from typer.testing import CliRunner

from atedm.app import comparison, prompts
from atedm.cli import app
from tests.helpers.shallow import shallow_pipeline

PROMPTS = ["a red circle", "a large blue square", "a green star"]


@pytest.fixture(scope="module")
def pipe():
    return shallow_pipeline(side=64)


@pytest.fixture
def overflowing(monkeypatch):
    """Has the autoencoder give ``value`` in the last picture of each batch."""

    def overflow(value):
        forward = Decoder.forward

        def decode(self, *given):
            out = forward(self, *given)
            out[-1, :, 3, 3] = value
            return out

        monkeypatch.setattr(Decoder, "forward", decode)

    return overflow


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_pixels_that_are_not_finite_are_seen_before_they_are_clamped(model, pipe, overflowing, tmp_path, value):
    overflowing(value)
    with pytest.raises(FloatingPointError, match="1 of 2 pictures have pixels that are not finite"):
        comparison.generate_image(pipe, comparison.ImageRequest(PROMPTS[0], steps=1, images=2))
    words = ["generate", PROMPTS[0], "--model", model, "--dtype", "fp32", "--size", 64, "--steps", 1, "--device", "cpu"]
    result = CliRunner().invoke(app, [str(word) for word in [*words, "--no-compare", "--output", tmp_path]])
    assert result.exit_code == 1 and "Error: 1 of 1 pictures have pixels that are not finite" in result.stderr
    cases, failed = [prompts.PromptCase(text, 0) for text in PROMPTS], []
    prompts.make_pictures(pipe, cases, prompts.Sampling(1, 5, 64, 64, 3), tmp_path / "many", on_failure=failed.append)
    assert [failure.number for failure in failed] == [2]
    assert sorted(path.name for path in (tmp_path / "many").iterdir()) == ["00000.png", "00001.png"]


def test_a_picture_is_the_pipelines_own_bit_for_bit(pipe):
    request = comparison.ImageRequest(PROMPTS[0], steps=1)
    expected = comparison._run(pipe, comparison.sized(request, pipe), output_type="pil").images[0]
    assert np.array_equal(comparison.generate_image(pipe, request).image, expected)
    assert pipe.image_processor.config.do_normalize
