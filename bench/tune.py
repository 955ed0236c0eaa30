"""Measures tiles for the attention-map kernels on this GPU and writes the fastest into their tables.

Every candidate runs on SDXL's shapes, has its result checked, and is timed as a CUDA graph with a cold L2. If one beats
the row in use, rows for all sizes measured go into ``tiles.json``, for this architecture and Triton version. Kernels
only look tiles up.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import functools
import itertools
import json
import multiprocessing
import os
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

import atedm_kernels as ops
from atedm.files import whole_file
from atedm_bench.measure import Graphs, error_line, seconds_of
from atedm_bench.ops.cases import OpInputs
from atedm_bench.ops.shapes import HEAD_DIM, shape_of
from atedm_kernels import tiles
from atedm_kernels.tiles import Tile

# Queries and keys per step. Smaller blocks cannot feed the matrix units, larger ones spill registers.
_BLOCKS = ((32, 64), (32, 128), (64, 64), (64, 128), (64, 256), (128, 64), (128, 128), (128, 32))
_WARPS = (4, 8)
_STAGES = (1, 2, 3, 4)
# The fastest of these are then tried with limits on registers, so that more programs share a multiprocessor, and with
# other numbers of programs, so that the last wave is full.
_FINALISTS = 3
_REGISTERS = (None, 168, 128, 96)
_PROGRAMS = (1, 256, 512, 1024, 2048, 4096)

# Processes that compile, in addition to the one that measures. More would not fit into memory.
_COMPILERS = 15

# A smaller gain is noise, and adds no row.
_MIN_GAIN = 0.02
_RATIO = 0.63

# Relative. Sums over a head's map may differ only by the order of the additions.
_TOLERANCE = 1e-4

Compilers = concurrent.futures.Executor

# Calls each op as the plug-in does.
TUNED: dict[str, Callable[[OpInputs], torch.Tensor]] = {
    # As a ranking calls it: with weights in the bias and a flag to check.
    "attention_column_sums": lambda i: ops.weighted_page_rank(i.q, i.k, i.lse, max_iterations=1, tolerance=0.0)[0],
    "similarity_source": lambda i: ops.similarity_source(i.q, i.k, i.lse, i.index),
    "weighted_page_rank_cross": lambda i: ops.weighted_page_rank_cross(
        i.q, i.text_k, i.text_lse, max_iterations=1, tolerance=0.0
    )[0],
}


def candidates(base: Tile) -> list[Tile]:
    """Return ``base``, then every other tile."""
    tried = [
        Tile(m, n, warps, stages, base.programs)
        for (m, n), warps, stages in itertools.product(_BLOCKS, _WARPS, _STAGES)
    ]
    return [base, *(tile for tile in tried if tile != base)]


def refinements(finalists: Iterable[Tile]) -> list[Tile]:
    """Return each finalist with every limit on registers and every number of programs."""
    tried = [
        replace(tile, max_registers=registers, programs=programs)
        for tile, registers, programs in itertools.product(finalists, _REGISTERS, _PROGRAMS)
    ]
    return list(dict.fromkeys(tried))


def agree(op: str, got: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether two tiles give the same result: sums up to rounding, sources except at near ties."""
    if op == "similarity_source":
        return (got != expected).float().mean().item() < 1e-3
    return bool(((got - expected).abs() <= _TOLERANCE * expected.abs().clamp_min(1e-12)).all())


def ratio_to(base: Tile, seconds: Mapping[Tile, Sequence[float]]) -> dict[Tile, float]:
    """Return each tile's mean time relative to ``base`` over the shapes, fastest first."""
    found = {
        tile: statistics.fmean(a / b for a, b in zip(times, seconds[base], strict=True))
        for tile, times in seconds.items()
    }
    return dict(sorted(found.items(), key=lambda item: item[1]))


def fastest(seconds: Mapping[Tile, Sequence[float]], base: Tile) -> tuple[Tile, float]:
    """Return the fastest tile and its mean time relative to ``base`` over the shapes; ``base`` if the gain is small."""
    best, ratio = next(iter(ratio_to(base, seconds).items()))
    return (best, ratio) if ratio < 1 - _MIN_GAIN else (base, 1.0)


def merge(table: list[dict[str, Any]], row: dict[str, Any]) -> list[dict[str, Any]]:
    """Put ``row`` into ``table``, replacing the one with the same key; specific rows first, those of ``"*"`` last."""
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
    with whole_file(path) as partial:
        partial.write_text("[\n" + ",\n".join("  " + json.dumps(row) for row in rows) + "\n]\n", encoding="utf-8")


def _inputs(side: int, dtype: torch.dtype, device: torch.device) -> list[OpInputs]:
    """Return inputs of ``side``² tokens, batches 2 and 8, with level 3's heads up to 1024 tokens, else level 2's."""
    level, pixels = (3, 32) if side <= 32 else (2, 16)
    return [OpInputs(shape_of(side * pixels, side * pixels, level, batch, _RATIO), dtype, device) for batch in (2, 8)]


@functools.cache
def _inputs_to_compile_for(side: int, dtype: torch.dtype) -> list[OpInputs]:
    return _inputs(side, dtype, torch.device("cuda"))


def _compile(op: str, side: int, dtype: torch.dtype, tile: Tile) -> None:
    """Compile ``tile``'s kernels into Triton's cache, for the process that measures."""
    with tiles.assume(**{op: tile}), contextlib.suppress(Exception):  # the measuring process reports what fails
        for inputs in _inputs_to_compile_for(side, dtype):
            TUNED[op](inputs)


class _Tuner:
    """Times tiles of one op at one number of tokens, with batches of 2 and 8."""

    def __init__(self, op: str, side: int, dtype: torch.dtype, repeats: int, compilers: Compilers) -> None:
        self.device = torch.device("cuda")
        self.call = TUNED[op]
        self.op, self.side, self.dtype, self.repeats = op, side, dtype, repeats
        self.compilers = compilers
        self.rejected: dict[str, int] = {}
        self.inputs = _inputs(side, dtype, self.device)
        with ops.backend("reference"):
            self.expected = [self.call(inputs) for inputs in self.inputs]
        self.base = tiles.tile_for(op, self.inputs[0].q)
        size = 2 * torch.cuda.get_device_properties(self.device).L2_cache_size
        self.flushed = torch.empty(size, dtype=torch.uint8, device=self.device)

    def time_all(self, wanted: Iterable[Tile], timed: dict[Tile, list[float]], what: str) -> None:
        """Compile the ``wanted`` tiles side by side, then time them one by one. Add the correct ones to ``timed``."""
        from rich.progress import track

        new = [tile for tile in wanted if tile not in timed]
        compiling = [self.compilers.submit(_compile, self.op, self.side, self.dtype, tile) for tile in new]
        for done in track(concurrent.futures.as_completed(compiling), f"{what}: compiling", len(compiling)):
            done.result()
        for tile in track(new, f"{what}: measuring"):
            seconds = self.seconds(tile)
            if seconds is not None:
                timed[tile] = seconds

    def seconds(self, tile: Tile) -> list[float] | None:
        """Return the median seconds for each batch, or None if the tile does not compile, does not fit or is wrong."""
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
                    # After an illegal access nothing runs in this process, and every tile would look unfit. Raise here.
                    torch.cuda.synchronize(self.device)
                    return self._reject(error_line(error))
                times = [seconds_of(run, self.device, self.flushed.zero_) for _ in range(self.repeats)]
                found.append(statistics.median(times))
        return found

    def _reject(self, why: str) -> None:
        self.rejected[why] = self.rejected.get(why, 0) + 1


@contextlib.contextmanager
def compilers() -> Iterator[Compilers]:
    """Start the processes that compile tiles while this process, which measures, waits."""
    context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
    with concurrent.futures.ProcessPoolExecutor(min(_COMPILERS, os.cpu_count() or 1), context) as pool:
        yield pool


def tune_op(
    op: str,
    counts: Sequence[int],
    repeats: int,
    path: Path,
    pool: Compilers,
    say: Callable[[str], None] = lambda line: None,
) -> None:
    """Tune ``op`` on square maps of ``counts`` tokens. Writes its table to ``path`` after each count."""
    table = json.loads(tiles.table_path(op).read_text(encoding="utf-8"))
    rows: list[dict[str, Any]] = []
    gained = False
    for count in counts:
        what = f"{op}, {count} tokens"
        tuner = _Tuner(op, round(count**0.5), torch.bfloat16, repeats, pool)
        timed: dict[Tile, list[float]] = {}
        tuner.time_all(candidates(tuner.base), timed, what)
        if tuner.base not in timed:
            raise RuntimeError(f"{what}: the tile in use fails: {tuner.rejected}")
        tuner.time_all(refinements(list(ratio_to(tuner.base, timed))[:_FINALISTS]), timed, what)
        best, ratio = fastest(timed, tuner.base)
        say(f"{what}: {best}, {ratio:.3f} of {tuner.base}; rejected: {tuner.rejected}")
        for tile, part in list(ratio_to(tuner.base, timed).items())[:8]:
            say(f"  {part:.3f} {[f'{1e6 * s:.1f} us' for s in timed[tile]]} {tile}")
        row = {"architecture": tiles.architecture(tuner.device), "dtypes": ["float16", "bfloat16"]}
        row |= {"head_dim": HEAD_DIM, "queries": count}
        row |= {name: value for name, value in asdict(best).items() if value is not None}
        rows.append(row | {"triton": tiles.triton_minor(), "device": torch.cuda.get_device_name()})
        gained |= best != tuner.base
        # Also write the rows that gained nothing: a row also serves all smaller maps that have no row of their own.
        table = functools.reduce(merge, rows if gained else [], table)
        write_table(table, path)
