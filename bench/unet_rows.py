"""Rows of ``atedm-bench unet`` that are computed from other rows, and the fields that come from a recording."""

from __future__ import annotations

import statistics
from typing import Any

import atedm
from atedm.unet.recording import Recording
from atedm_bench.unet_variants import LIGHT, OURS

AVERAGE = "ours DSAP average"


def average_row(rows: list[dict[str, Any]], suffix: str, steps: int) -> list[dict[str, Any]]:
    """Average our call over a run of ``steps`` steps with DSAP, from the rows of its two phases, if both are there."""
    by_name = {row["name"]: row for row in rows}
    light, rest = by_name.get(LIGHT + suffix), by_name.get(OURS + suffix)
    if light is None or rest is None:
        return []
    light_steps = atedm.DSAP().light_steps(steps)

    def mean(key: str) -> float:
        return (light_steps * light[key] + (steps - light_steps) * rest[key]) / steps

    return [
        {
            "name": AVERAGE + suffix,
            "seconds": mean("seconds"),
            "run_seconds": steps * mean("seconds"),
            "steps": steps,
            "light_steps": light_steps,
            "derived": True,
            "tflops": mean("tflops"),
            "scoring_tflops": mean("scoring_tflops"),
            **{key: mean(key) for key in _in_both(light, rest) if key.startswith("stage_")},
            **{key: max(light[key], rest[key]) for key in _in_both(light, rest) if key == "peak_memory_bytes"},
            **{key: rest[key] for key in ("ratio", "placement", "compiled")},
            "phase": "average",
        }
    ]


def _in_both(first: dict[str, Any], second: dict[str, Any]) -> list[str]:
    """Return the keys for which both rows have a value; rows of an interrupted run lack the last ones."""
    return [key for key, value in first.items() if value is not None and second.get(key) is not None]


def ranking_facts(recording: Recording) -> dict[str, Any]:
    """Return the ranking's iterations (mean over blocks, images and heads) and the tokens kept at each level."""
    iterations = [entry.iterations.float().mean().item() for entry in recording.ranked if entry.iterations is not None]
    facts: dict[str, Any] = {"page_rank_iterations": statistics.fmean(iterations) if iterations else None}
    for entry in recording.ranked:
        facts[f"tokens_level_{entry.level}"] = entry.tokens
        facts[f"kept_tokens_level_{entry.level}"] = entry.index.shape[1]
    facts["pruned_blocks"] = len(recording.ranked)
    return facts
