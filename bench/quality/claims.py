"""What the paper claims, and what we do, checked on a run's rows: does it hold here, by which numbers?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from atedm.bench.quality.metrics import paired_difference
from atedm.bench.quality.settings import BUDGETS, MAIN

# Figures that are compared, and whether more is better.
MEASURES = {
    "accuracy": True,
    "frechet_distance": False,
    "clip_score": True,
    "psnr_db": True,
    "ssim": True,
    "perceptual_distance": False,
}


@dataclass(frozen=True)
class Claim:
    """``better`` should beat ``worse`` (names of rows)."""

    text: str
    pairs: tuple[tuple[str, str], ...]


_LEVEL_3 = "level 2 whole, same FLOPs"

CLAIMS = (
    Claim("ours beats ToMe at equal FLOPs", tuple((f"ours {b}", f"tomesd {b}") for b in BUDGETS)),
    Claim("ours beats ToMe at equal FLOPs, level 3 alone", ((_LEVEL_3, f"tomesd {MAIN}"),)),
    Claim("ours beats random pruning at equal FLOPs", tuple((f"ours {b}", f"random {b}") for b in BUDGETS)),
    Claim("ours beats random pruning, level 3 alone", ((_LEVEL_3, "level 2 whole, random"),)),
    Claim(
        "DSAP helps (at equal FLOPs)",
        ((f"ours {MAIN}", "DSAP off, same FLOPs"), (_LEVEL_3, "level 2 whole, DSAP off")),
    ),
    Claim(
        "similarity-based copy beats the other recoveries",
        (
            *((f"ours {MAIN}", f"recovery: {other}") for other in ("zeros", "bicubic")),
            *((_LEVEL_3, f"level 2 whole, recovery: {other}") for other in ("zeros", "bicubic")),
        ),
    ),
    Claim(
        "self-attention ranking beats cross-attention ranking",
        ((f"ours {MAIN}", "ranking: cross-attention"), (_LEVEL_3, "level 2 whole, ranking: cross-attention")),
    ),
    Claim(
        "RMS over heads beats their mean",
        ((f"ours {MAIN}", "heads: mean"), (_LEVEL_3, "level 2 whole, heads: mean")),
    ),
    # Not the paper's, but ours.
    Claim("keys beat attention (by keys against ours)", tuple((f"keys {b}", f"ours {b}") for b in BUDGETS)),
    Claim("by keys beats ToMe at equal FLOPs", tuple((f"keys {b}", f"tomesd {b}") for b in BUDGETS)),
    Claim("by keys beats random pruning that recovers by keys", ((f"keys {MAIN}", "random, recovery: keys"),)),
    Claim(
        "recovery by keys beats similarity-based copy",
        (("recovery: keys", f"ours {MAIN}"), ("level 2 whole, recovery: keys", _LEVEL_3)),
    ),
    Claim("a grid of kept tokens helps (by keys)", ((f"keys {MAIN}", "by keys, no grid"),)),
    Claim("DSAP helps by keys (at equal FLOPs)", ((f"keys {MAIN}", "by keys, DSAP off, same FLOPs"),)),
)


def _apart(low: float, high: float) -> int:
    """1 or -1: the side of 0 that an interval lies on; 0 where it holds 0."""
    return 1 if low > 0 else -1 if high < 0 else 0


def check_claims(
    rows: Sequence[dict[str, Any]], samples: Mapping[str, Mapping[str, np.ndarray]]
) -> list[dict[str, Any]]:
    """Flat rows, one a claim and pair of settings that were both run.

    A measure tells two settings apart where the 95 % interval of their difference excludes 0: paired by picture where
    ``samples`` (setting → measure → one number a picture) has it, else by the rows' own intervals, which must not
    overlap. ``verdict``: "holds" where more measures are for the claim than against it, "does not hold" where fewer
    are, "undecided" otherwise.
    """
    by_name = {row["name"]: row for row in rows}
    found = []
    for claim in CLAIMS:
        for better, worse in claim.pairs:
            if better in by_name and worse in by_name:
                row: dict[str, Any] = {"name": claim.text, "better": better, "worse": worse}
                signs = []
                for measure, more in MEASURES.items():
                    a, b = by_name[better], by_name[worse]
                    if measure not in a or measure not in b:
                        continue
                    row |= {measure: a[measure], f"{measure}_of_worse": b[measure]}
                    if measure in samples.get(better, {}) and measure in samples.get(worse, {}):
                        difference = paired_difference(samples[better][measure], samples[worse][measure])
                        keys = ("difference", "difference_low", "difference_high")
                        row |= {f"{measure}_{key}": value for key, value in zip(keys, difference, strict=True)}
                        sign = _apart(*difference[1:])
                    elif f"{measure}_low" in a:
                        sign = _apart(
                            a[f"{measure}_low"] - b[f"{measure}_high"], a[f"{measure}_high"] - b[f"{measure}_low"]
                        )
                    else:
                        continue  # without an interval nothing can be said
                    signs.append(sign if more else -sign)
                row["for"], row["against"] = signs.count(1), signs.count(-1)
                total = sum(signs)
                row["verdict"] = "holds" if total > 0 else "does not hold" if total < 0 else "undecided"
                found.append(row)
    return found
