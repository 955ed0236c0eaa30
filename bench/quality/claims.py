"""Checks the paper's claims and our own on a run's rows: whether each holds, and by which numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import binomtest

from atedm_bench.quality.metrics import draws_difference, paired_difference
from atedm_bench.quality.settings import BUDGETS, MAIN, TOKEN_SHARES, TOKENS

# Confidence level of every test. It is strict because there are a few dozen tests.
LEVEL = 0.99

# Two settings are comparable if their FLOPs differ by at most this fraction, or if the better one wins with fewer.
_NEAR = 0.02


@dataclass(frozen=True)
class Measure:
    """How a measure is used.

    ``more``: whether more is better. ``decides``: whether it judges the picture itself, not its likeness to another.
    ``draws``: whether the samples are bootstrap draws instead of one number per picture.
    """

    more: bool
    decides: bool
    draws: bool = False


MEASURES = {
    "accuracy": Measure(True, True),
    "frechet_distance": Measure(False, True, draws=True),
    "fid": Measure(False, True, draws=True),
    "clip_score": Measure(True, True),
    "psnr_db": Measure(True, False),
    "ssim": Measure(True, False),
    "perceptual_distance": Measure(False, False),
}


@dataclass(frozen=True)
class Claim:
    """A claim that one setting beats another.

    ``pairs``: names of rows, ``(better, worse)``. ``ours``: whether the claim is ours, not the paper's.
    """

    text: str
    pairs: tuple[tuple[str, str], ...]
    ours: bool = False


_LEVEL_3 = "level 2 whole"

CLAIMS = (
    Claim("ours beats ToMe at equal FLOPs", tuple((f"ours {b}", f"tomesd {b}") for b in BUDGETS)),
    Claim("ours at level 3 alone beats ToMe at equal FLOPs", ((_LEVEL_3, f"tomesd {MAIN}"),)),
    Claim("ours beats random pruning at equal FLOPs", tuple((f"ours {b}", f"random {b}") for b in BUDGETS)),
    Claim("DSAP helps (at equal FLOPs)", ((f"ours {MAIN}", "DSAP off"),)),
    Claim(
        "similarity-based copy beats the other recoveries",
        tuple((f"ours {MAIN}", f"recovery: {other}") for other in ("zeros", "bicubic")),
    ),
    Claim("self-attention ranking beats cross-attention ranking", ((f"ours {MAIN}", "ranking: cross-attention"),)),
    Claim("recovery by keys beats similarity-based copy", (("recovery: keys", f"ours {MAIN}"),), ours=True),
    Claim(
        "tokens that keep their last update beat ToMe and random tokens at equal FLOPs",
        tuple(
            (f"{ranking} {share} %", f"{peer} {share} %")
            for ranking in TOKENS
            for share in TOKEN_SHARES
            for peer in ("tomesd", "random")
        ),
        ours=True,
    ),
    Claim(
        "the presets beat DeepCache at no more FLOPs",
        (("quality", "DeepCache 2"), ("default", "DeepCache 2"), ("fast", "DeepCache 3")),
        ours=True,
    ),
)


def _sign(measure: Measure, a: np.ndarray, b: np.ndarray, low: float, high: float) -> int:
    """Return 1 if ``a`` has more at ``LEVEL``, -1 if ``b`` has more, 0 if undecided."""
    if set(np.unique(np.concatenate([a, b]))) <= {0.0, 1.0}:
        # McNemar's exact test: only pictures that are right in exactly one setting count.
        only_a, only_b = int((a > b).sum()), int((a < b).sum())
        if only_a + only_b == 0 or binomtest(only_a, only_a + only_b).pvalue > 1 - LEVEL:
            return 0
        return 1 if only_a > only_b else -1
    return 1 if low > 0 else -1 if high < 0 else 0


def _agreed(signs: Sequence[int], words: tuple[str, str, str, str]) -> str:
    """Return one of ``words``, which are for only wins, only losses, both, and neither."""
    won, lost = 1 in signs, -1 in signs
    return words[2] if won and lost else words[0] if won else words[1] if lost else words[3]


def _compare(row: dict[str, Any], a: dict[str, Any], b: dict[str, Any], samples: Mapping[str, Any]) -> dict[str, Any]:
    """Add to ``row`` every measure that both settings have, and the verdict."""
    signs: dict[bool, list[int]] = {True: [], False: []}
    for name, measure in MEASURES.items():
        if name not in a or name not in b:
            continue
        row |= {name: a[name], f"{name}_of_worse": b[name]}
        ours, theirs = (samples.get(x["name"], {}).get(name) for x in (a, b))
        if ours is None or theirs is None:
            continue  # no test without samples
        find = draws_difference if measure.draws else paired_difference
        difference, low, high = find(ours, theirs, LEVEL)
        row |= {f"{name}_difference": difference, f"{name}_difference_low": low, f"{name}_difference_high": high}
        sign = _sign(measure, ours, theirs, low, high)
        signs[measure.decides].append(sign if measure.more else -sign)
    row |= {"flops_part": a["flops_part"], "flops_part_of_worse": b["flops_part"]}
    row["likeness"] = _agreed(signs[False], ("for", "against", "mixed", "undecided"))
    row["verdict"] = _agreed(signs[True], ("holds", "does not hold", "mixed", "undecided"))
    more = a["flops_part"] / b["flops_part"] - 1
    if more > _NEAR or (more < -_NEAR and row["verdict"] != "holds"):
        row["verdict"] = "not comparable"
    return row


def check_claims(
    rows: Sequence[dict[str, Any]], samples: Mapping[str, Mapping[str, np.ndarray]]
) -> list[dict[str, Any]]:
    """Return flat rows, one for each claim and pair of settings of which the run has both.

    ``verdict`` is "holds" or "does not hold" if a measure of the pictures themselves (prompt accuracy and Fréchet
    distance, or CLIP score) separates the two settings at ``LEVEL``, paired by picture. It is "mixed" if two measures
    contradict each other, "undecided" if no measure separates them, and "not comparable" if the FLOPs differ.
    ``likeness`` says the same of the likeness to the full model's pictures; it does not affect the verdict.
    ``claim_verdict`` sums up all pairs of the claim.

    Args:
        samples: setting → measure → one number per picture, or bootstrap draws (see :class:`Measure`).
    """
    by_name = {row["name"]: row for row in rows}
    found = []
    for claim in CLAIMS:
        of_claim = [
            _compare(
                {"name": claim.text, "of": "ours" if claim.ours else "paper", "better": better, "worse": worse},
                by_name[better],
                by_name[worse],
                samples,
            )
            for better, worse in claim.pairs
            if better in by_name and worse in by_name
        ]
        verdicts = [row["verdict"] for row in of_claim]
        signs = [{"holds": 1, "does not hold": -1}.get(verdict, 0) for verdict in verdicts]
        overall = "mixed" if "mixed" in verdicts else _agreed(signs, ("holds", "does not hold", "mixed", "undecided"))
        found += [{**row, "claim_verdict": overall} for row in of_claim]
    return found
