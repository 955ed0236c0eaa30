"""The rows of ``atedm-bench unet``: what was timed, what follows from other rows, and the facts of a recording."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

import atedm
from atedm.unet.recording import Recording
from atedm_bench.unet_calls import COMPILED, GRAPH, UNetVariant
from atedm_bench.unet_variants import FULL, LIGHT, OURS

AVERAGE = "ours DSAP average"

# The key of a row's speed-up over the full UNet that runs in the same way, by the suffix of its name.
_SPEEDUPS = {
    "": "speedup",
    COMPILED: "speedup_over_full_compiled",
    GRAPH: "speedup_over_full_graph",
    COMPILED + GRAPH: "speedup_over_full_compiled_graph",
}


def measured_rows(variants: Sequence[UNetVariant], steps: int) -> list[dict[str, Any]]:
    """Return a row for each variant that was timed, then DSAP's average over a run of ``steps`` steps."""
    rows = [
        {
            "name": variant.name,
            "seconds": statistics.median(variant.seconds),
            "seconds_low": min(variant.seconds),
            "seconds_high": max(variant.seconds),
            "repeats": len(variant.seconds),
            "derived": False,
            **variant.fields,
        }
        for variant in variants
        if variant.seconds
    ]
    for suffix in _SPEEDUPS:
        rows += _average_row(rows, suffix, steps)
    seconds = {row["name"]: row["seconds"] for row in rows}
    for row in rows:
        for suffix, key in _SPEEDUPS.items():
            full = seconds.get(FULL + suffix)
            row[key] = None if full is None else full / row["seconds"]
    return rows


def _average_row(rows: list[dict[str, Any]], suffix: str, steps: int) -> list[dict[str, Any]]:
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
