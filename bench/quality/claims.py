"""What the paper claims, checked on a run's rows: does it hold here, by which numbers?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from atedm.bench.quality.settings import BUDGETS, MAIN

# Figures that are compared, and whether more is better.
MEASURES = {"accuracy": True, "frechet_distance": False, "psnr_db": True, "ssim": True, "perceptual_distance": False}
REAL_MEASURES = {"clip_score": True, "fid": False, "psnr_db": True, "ssim": True}


@dataclass(frozen=True)
class Claim:
    """``better`` should beat ``worse`` (names of rows)."""

    text: str
    pairs: tuple[tuple[str, str], ...]


CLAIMS = (
    Claim("ours beats ToMe at equal FLOPs", tuple((f"ours {b}", f"tomesd {b}") for b in BUDGETS)),
    Claim("ours beats random pruning at equal FLOPs", tuple((f"ours {b}", f"random {b}") for b in BUDGETS)),
    Claim("DSAP helps (at equal FLOPs)", ((f"ours {MAIN}", "DSAP off, same FLOPs"),)),
    Claim(
        "similarity-based copy beats the other recoveries",
        ((f"ours {MAIN}", "recovery: zeros"), (f"ours {MAIN}", "recovery: bicubic")),
    ),
    Claim("self-attention ranking beats cross-attention ranking", ((f"ours {MAIN}", "ranking: cross-attention"),)),
    Claim("RMS over heads beats their mean", ((f"ours {MAIN}", "heads: mean"),)),
)


def _compare(better: dict[str, Any], worse: dict[str, Any], measure: str, more: bool) -> int:
    """1 where ``better`` is ahead, -1 where it is behind, 0 where the intervals overlap."""
    a, b = better[measure], worse[measure]
    ahead = 1 if (a > b) == more else -1
    if f"{measure}_low" in better and f"{measure}_low" in worse:
        apart = (
            better[f"{measure}_low"] > worse[f"{measure}_high"] or better[f"{measure}_high"] < worse[f"{measure}_low"]
        )
        return ahead if apart else 0
    return 0 if a == b else ahead


def check_claims(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Flat rows, one a claim and pair of settings that were both run.

    ``verdict``: "holds" where most of the measures that tell the two apart are for it, "does not hold" where most
    are against it, "undecided" otherwise. A measure with intervals tells two settings apart where they do not overlap.
    """
    by_name = {row["name"]: row for row in rows}
    found = []
    for claim in CLAIMS:
        for better, worse in claim.pairs:
            if better not in by_name or worse not in by_name:
                continue
            a, b = by_name[better], by_name[worse]
            row: dict[str, Any] = {"name": claim.text, "better": better, "worse": worse}
            signs = []
            for measure, more in {**MEASURES, **REAL_MEASURES}.items():
                if measure in a and measure in b:
                    row |= {measure: a[measure], f"{measure}_of_worse": b[measure]}
                    signs.append(_compare(a, b, measure, more))
            total = sum(signs)
            row["for"], row["against"] = signs.count(1), signs.count(-1)
            row["verdict"] = "holds" if total > 0 else "does not hold" if total < 0 else "undecided"
            found.append(row)
    return found
