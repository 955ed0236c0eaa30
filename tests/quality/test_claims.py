"""Verdicts on the paper's claims follow from the rows."""

import numpy as np
import pytest

from atedm.bench.quality.claims import check_claims


def row(name, accuracy, distance):
    return {
        "name": name,
        "accuracy": accuracy,
        "accuracy_low": accuracy - 0.02,
        "accuracy_high": accuracy + 0.02,
        "psnr_db": distance,
        "psnr_db_low": distance - 1,
        "psnr_db_high": distance + 1,
    }


@pytest.mark.parametrize(
    ("ours", "other", "verdict"),
    [
        ((0.9, 20.0), (0.8, 15.0), "holds"),
        ((0.9, 20.0), (0.89, 15.0), "holds"),
        ((0.8, 15.0), (0.9, 20.0), "does not hold"),
        ((0.9, 20.0), (0.91, 20.5), "undecided"),
        ((0.9, 15.0), (0.8, 20.0), "undecided"),
    ],
)
def test_verdict(ours, other, verdict):
    found = check_claims([row("ours c", *ours), row("tomesd c", *other)], {})
    assert [(r["better"], r["worse"], r["verdict"]) for r in found] == [("ours c", "tomesd c", verdict)]
    assert found[0]["accuracy"] == ours[0]
    assert found[0]["accuracy_of_worse"] == other[0]


def test_smaller_is_better_for_distances():
    a = {"name": "ours c", "perceptual_distance": 1.0, "perceptual_distance_low": 0.9, "perceptual_distance_high": 1.1}
    b = {
        "name": "recovery: zeros",
        "perceptual_distance": 2.0,
        "perceptual_distance_low": 1.8,
        "perceptual_distance_high": 2.2,
    }
    assert check_claims([a, b], {})[0]["verdict"] == "holds"


def test_claims_about_settings_that_were_not_run_are_left_out():
    assert check_claims([row("full", 0.9, 20.0)], {}) == []


def test_pictures_of_the_same_prompts_are_compared_in_pairs():
    """Differences that the rows' intervals hide show where every picture is a little better."""
    rng = np.random.default_rng(0)
    worse = rng.normal(20, 5, 100)
    samples = {"ours c": {"psnr_db": worse + 0.3 + rng.normal(0, 0.2, 100)}, "random c": {"psnr_db": worse}}
    rows = [
        {"name": name, "psnr_db": x["psnr_db"].mean(), "psnr_db_low": 19.0, "psnr_db_high": 21.0}
        for name, x in samples.items()
    ]
    found = check_claims(rows, samples)[0]
    assert found["verdict"] == "holds"
    assert 0.2 < found["psnr_db_difference_low"] < found["psnr_db_difference"] < found["psnr_db_difference_high"] < 0.4
    swapped = {"ours c": samples["random c"], "random c": samples["ours c"]}
    assert check_claims(rows, swapped)[0]["verdict"] == "does not hold"
