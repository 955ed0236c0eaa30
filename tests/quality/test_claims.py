"""Verdicts on claims follow from the rows and from the samples behind them."""

import numpy as np
import pytest

from atedm_bench.quality.claims import CLAIMS, check_claims

RNG = np.random.default_rng(0)
NOISE = RNG.normal(0, 5, 200)


def right(count):
    """200 pictures, the first ``count`` of them right."""
    return (np.arange(200) < count).astype(float)


def setting(name, accuracy=160, distance=1.0, psnr=20.0, flops=0.5):
    samples = {
        "accuracy": right(accuracy),
        "frechet_distance": distance + NOISE[:100] * 0.01,
        "psnr_db": psnr + NOISE,
    }
    row = {"name": name, "flops_part": flops} | {key: float(value.mean()) for key, value in samples.items()}
    return row, samples


def verdict(ours, other, names=("ours c", "tomesd c")):
    made = [setting(name, **values) for name, values in zip(names, (ours, other), strict=True)]
    found = check_claims([row for row, _ in made], {row["name"]: samples for row, samples in made})
    assert {(row["better"], row["worse"]) for row in found} == {names}
    return found[0]


@pytest.mark.parametrize(
    ("ours", "other", "expected", "likeness"),
    [
        ({"accuracy": 180}, {}, "holds", "undecided"),
        ({"accuracy": 140}, {}, "does not hold", "undecided"),
        ({"distance": 0.5}, {}, "holds", "undecided"),
        ({"distance": 1.5}, {}, "does not hold", "undecided"),
        ({"accuracy": 180, "distance": 1.5}, {}, "mixed", "undecided"),
        ({}, {}, "undecided", "undecided"),
        # Likeness to another picture is told, and decides nothing.
        ({"psnr": 21.0}, {}, "undecided", "for"),
        ({"accuracy": 140, "psnr": 21.0}, {}, "does not hold", "for"),
        ({"accuracy": 180, "psnr": 19.0}, {}, "holds", "against"),
        # Of 200 pictures, 4 that are right in one alone are chance (McNemar: p = 0.125), 8 are not (p = 0.008).
        ({"accuracy": 164}, {}, "undecided", "undecided"),
        ({"accuracy": 168}, {}, "holds", "undecided"),
        ({"accuracy": 180, "flops": 0.52}, {}, "not comparable", "undecided"),
        ({"accuracy": 180, "flops": 0.505}, {}, "holds", "undecided"),
        # With fewer FLOPs, better is better, and no better tells nothing.
        ({"accuracy": 180, "flops": 0.4}, {}, "holds", "undecided"),
        ({"accuracy": 140, "flops": 0.4}, {}, "not comparable", "undecided"),
    ],
)
def test_verdict(ours, other, expected, likeness):
    found = verdict(ours, other)
    assert (found["verdict"], found["likeness"]) == (expected, likeness)
    assert found["accuracy"] == ours.get("accuracy", 160) / 200
    assert found["accuracy_of_worse"] == 0.8


def test_a_claim_has_the_verdict_that_its_pairs_agree_on():
    def overall(*accuracies):
        made = []
        for budget, accuracy in zip("abcd", accuracies, strict=False):
            made += [setting(f"ours {budget}", accuracy=accuracy), setting(f"tomesd {budget}")]
        found = check_claims([row for row, _ in made], {row["name"]: samples for row, samples in made})
        assert len(found) == len(accuracies)
        return {row["claim_verdict"] for row in found}

    assert overall(180, 180) == overall(180, 160) == {"holds"}
    assert overall(140, 160) == {"does not hold"}
    assert overall(140, 180) == {"mixed"}
    assert overall(160, 160) == {"undecided"}


def test_differences_that_intervals_hide_show_in_pairs():
    found = verdict({"psnr": 20.3}, {})
    assert found["likeness"] == "for"
    assert found["psnr_db_difference"] == pytest.approx(0.3)
    assert found["psnr_db_difference_low"] <= found["psnr_db_difference"] <= found["psnr_db_difference_high"]


def test_figures_without_samples_are_quoted_and_tell_nothing():
    rows = [
        {"name": name, "flops_part": 0.5, "fid": fid, "clip_score": clip}
        for name, fid, clip in (("ours c", 10.0, 30.0), ("tomesd c", 20.0, 31.0))
    ]
    samples = {row["name"]: {"clip_score": row["clip_score"] + NOISE} for row in rows}
    found = check_claims(rows, samples)[0]
    assert (found["fid"], found["fid_of_worse"]) == (10.0, 20.0)
    assert found["verdict"] == "does not hold"  # by the CLIP score


def test_claims_about_settings_that_were_not_run_are_left_out():
    row, samples = setting("full")
    assert check_claims([row], {"full": samples}) == []


def test_the_papers_claims_are_told_from_ours():
    assert {claim.ours for claim in CLAIMS} == {True, False}
    assert verdict({}, {}, ("drift 65 %", "tomesd 65 %"))["of"] == "ours"
    assert verdict({}, {}, ("ours c", "tomesd c"))["of"] == "paper"
