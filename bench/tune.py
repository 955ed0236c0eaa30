"""Measures tiles for the attention-map kernels on this GPU and writes the fastest into their tables.

Every candidate runs on SDXL's shapes, has its result checked, and is timed as a CUDA graph with a cold L2. If it beats
the row in use, a row for this architecture and Triton version goes into ``tiles.json``. Kernels only look tiles up.
"""

from __future__ import annotations

import itertools
import json
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

import atedm_kernels as ops
from atedm_bench.measure import Graphs, error_line, seconds_of
from atedm_bench.ops.cases import OpInputs
from atedm_bench.ops.shapes import HEAD_DIM, shape_of
from atedm_kernels import tiles
from atedm_kernels.tiles import Tile

# Queries and keys per step. Smaller blocks cannot feed the matrix units, larger ones spill registers.
_BLOCKS = ((32, 64), (32, 128), (64, 64), (64, 128), (64, 256), (128, 64), (128, 128), (128, 32))
_WARPS = (4, 8)
_STAGES = (1, 2, 3, 4)
_PROGRAMS = (1, 256, 512, 1024)

# A smaller gain is noise and earns no row.
_MIN_GAIN = 0.02
_RATIO = 0.63

# Sums over a head's map may differ only by the order of additions.
_TOLERANCE = 1e-4

# Each op, called as the plug-in calls it.
TUNED: dict[str, Callable[[OpInputs], torch.Tensor]] = {
    # As a ranking calls it: with weights in the bias and a flag to check.
    "attention_column_sums": lambda i: ops.weighted_page_rank(i.q, i.k, i.lse, max_iterations=1, tolerance=0.0)[0],
    "similarity_source": lambda i: ops.similarity_source(i.q, i.k, i.lse, i.index),
    "weighted_page_rank_cross": lambda i: ops.weighted_page_rank_cross(
        i.q, i.text_k, i.text_lse, max_iterations=1, tolerance=0.0
    )[0],
}


def candidates(base: Tile) -> list[Tile]:
    """``base`` first, then every other tile."""
    tried = [
        Tile(m, n, warps, stages, base.programs)
        for (m, n), warps, stages in itertools.product(_BLOCKS, _WARPS, _STAGES)
    ]
    return [base, *(tile for tile in tried if tile != base)]


def agree(op: str, got: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether two tiles give the same result: sums up to rounding, sources except for near ties."""
    if op == "similarity_source":
        return (got != expected).float().mean().item() < 1e-3
    return bool(((got - expected).abs() <= _TOLERANCE * expected.abs().clamp_min(1e-12)).all())


def fastest(seconds: dict[Tile, Sequence[float]], base: Tile) -> tuple[Tile, float]:
    """The tile of lowest mean ratio to ``base`` over the shapes, and that ratio; ``base`` if the gain is small."""

    def ratio(tile: Tile) -> float:
        return statistics.fmean(a / b for a, b in zip(seconds[tile], seconds[base], strict=True))

    best = min(seconds, key=ratio)
    return (best, ratio(best)) if ratio(best) < 1 - _MIN_GAIN else (base, 1.0)


def merge(table: list[dict[str, Any]], row: dict[str, Any]) -> list[dict[str, Any]]:
    """``table`` with ``row`` in place of the row that it replaces, specific rows before general ones, ``"*"`` last."""
    key = ("architecture", "dtypes", "head_dim", "queries", "triton")
    kept = [old for old in table if any(old.get(name) != row.get(name) for name in key)]
    named = [old for old in kept if old["architecture"] != "*"] + [row]
    named.sort(
        key=lambda r: (
            r["architecture"],
            r.get("triton", ""),
            r["dtypes"],
            r["head_dim"],
            r.get("queries", float("inf")),
        )
    )
    return named + [old for old in kept if old["architecture"] == "*"]


def write_table(rows: Iterable[dict[str, Any]], path: Path) -> None:
    """Write one row per line, so that a diff shows what changed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("[\n" + ",\n".join("  " + json.dumps(row) for row in rows) + "\n]\n", encoding="utf-8")


class _Tuner:
    """Times tiles of one op at one number of tokens, with batches of 2 and 8."""

    def __init__(self, op: str, side: int, dtype: torch.dtype, repeats: int) -> None:
        self.device = torch.device("cuda")
        self.call = TUNED[op]
        self.op, self.repeats = op, repeats
        self.rejected: dict[str, int] = {}
        # Level 3's heads up to 1024 tokens, level 2's above, as in SDXL.
        level, pixels = (3, 32) if side <= 32 else (2, 16)
        shapes = [shape_of(side * pixels, side * pixels, level, batch, _RATIO) for batch in (2, 8)]
        self.inputs = [OpInputs(shape, dtype, self.device) for shape in shapes]
        with ops.backend("reference"):
            self.expected = [self.call(inputs) for inputs in self.inputs]
        self.base = tiles.tile_for(op, self.inputs[0].q)
        size = 2 * torch.cuda.get_device_properties(self.device).L2_cache_size
        self.flushed = torch.empty(size, dtype=torch.uint8, device=self.device)

    def seconds(self, tile: Tile) -> list[float] | None:
        """Median seconds by batch; None if the tile does not compile, does not fit or gives a wrong result."""
        found = []
        graphs = Graphs(self.device)
        with tiles.assume(**{self.op: tile}):
            for inputs, expected in zip(self.inputs, self.expected, strict=True):
                try:
                    if not agree(self.op, self.call(inputs), expected):
                        return self._reject("wrong result")
                    run = graphs.capture(lambda inputs=inputs: self.call(inputs))
                # Triton and its backends raise many types of errors for a tile that is too large.
                except Exception as error:
                    # After an illegal access nothing runs in this process, and every tile would look unfit: raise here.
                    torch.cuda.synchronize(self.device)
                    return self._reject(error_line(error))
                times = [seconds_of(run, self.device, self.flushed.zero_) for _ in range(self.repeats)]
                found.append(statistics.median(times))
        return found

    def _reject(self, why: str) -> None:
        self.rejected[why] = self.rejected.get(why, 0) + 1


def tune_op(
    op: str, counts: Sequence[int], repeats: int, path: Path, say: Callable[[str], None] = lambda line: None
) -> None:
    """Tune ``op`` on square maps of ``counts`` tokens and write its table to ``path``."""
    from rich.progress import track

    table = json.loads(tiles.table_path(op).read_text(encoding="utf-8"))
    for count in counts:
        tuner = _Tuner(op, round(count**0.5), torch.bfloat16, repeats)
        timed: dict[Tile, Sequence[float]] = {}
        for tile in track(candidates(tuner.base), f"{op}, {count} tokens"):
            seconds = tuner.seconds(tile)
            if seconds is not None:
                timed[tile] = seconds
        if tuner.base not in timed:
            raise RuntimeError(f"{op}, {count} tokens: the tile in use fails: {tuner.rejected}")
        best, _ = fastest(timed, tuner.base)
        for programs in _PROGRAMS:
            tile = Tile(**{**asdict(best), "programs": programs})
            seconds = timed[tile] if tile in timed else tuner.seconds(tile)
            if seconds is not None:
                timed[tile] = seconds
        best, ratio = fastest(timed, tuner.base)
        say(f"{op}, {count} tokens: {best}, {ratio:.3f} of {tuner.base}; rejected: {tuner.rejected}")
        if best != tuner.base:
            row = {"architecture": tiles.architecture(tuner.device), "dtypes": ["float16", "bfloat16"]}
            row |= {"head_dim": HEAD_DIM, "queries": count}
            row |= {**asdict(best), "triton": tiles.triton_minor(), "device": torch.cuda.get_device_name()}
            table = merge(table, row)
    write_table(table, path)
