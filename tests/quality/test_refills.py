"""The study of what dropped tokens are refilled from."""

import pytest
import torch

from atedm.app.prompts import Sampling
from atedm.embedded import embedded_pipeline
from atedm_bench.quality import refills
from atedm_bench.quality.lab import scene_cases


def test_figures_of_a_map_that_is_told_by_hand():
    # A 3 × 3 map of which the corners 0 and 8 are kept; 1 to 6 are refilled from 0, and 7 from 8.
    k = torch.zeros(1, 2, 9, 4)
    k[..., 0] = 1.0
    k[:, 1, 7, 0], k[:, 1, 7, 1] = 0.0, 1.0  # in one of two heads unlike the others
    index, source = torch.tensor([[0, 8]]), torch.tensor([[0, 0, 0, 0, 0, 0, 0, 1, 1]])
    found = refills._described(k, index, source, side=3)
    distances = [1, 2, 1, 2**0.5, 5**0.5, 2, 1]
    assert found == {
        "side": 3,
        "kept": pytest.approx(2 / 9),
        "from_most_used": pytest.approx(6 / 7),  # one token is the least that 5 % can be
        "distance": pytest.approx(sum(distances) / 7),
        "key_cosine": pytest.approx((6 + 0.5) / 7),
    }


def test_rows_of_the_embedded_model():
    pipe = embedded_pipeline()
    pipe.set_progress_bar_config(disable=True)
    side = pipe.unet.config.sample_size * pipe.vae_scale_factor
    rows = refills.study(pipe, scene_cases(1), 0.6, Sampling(3, 5.0, side, side, 1))
    assert [(row["name"], row["level"]) for row in rows] == [(name, level) for name in refills.WAYS for level in (2, 3)]
    for row in rows:
        assert row["kept"] == pytest.approx(0.4, abs=0.01)
        assert 0.05 < row["from_most_used"] <= 1
        assert 0 < row["distance"] < 2**0.5 * row["side"]
        assert -1 <= row["key_cosine"] <= 1
        assert 0 <= row["kept_again"] <= 1
    cosines = {(row["name"], row["level"]): row["key_cosine"] for row in rows}
    assert all(cosines["by keys", level] > cosines["ours (AT-EDM)", level] for level in (2, 3))
