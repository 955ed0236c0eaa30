"""Compares a full, a pruned and a merged UNet with random weights: one call, all variants in one run; then whole runs.

The variants are UNet objects that share one copy of the weights, so they take turns without being patched in between.
They run round robin. Each round starts with a different variant, so a slowdown of the machine affects all of them. A
row gives the median over the rounds.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Mapping
from typing import Any

import torch

import atedm
from atedm.app.flops import STAGES
from atedm_bench import host
from atedm_bench.measure import Graphs, by_turns, error_line, op_seconds_of, peak_memory_of, seconds_of
from atedm_bench.random_unet import sharing_weights
from atedm_bench.unet_calls import GRAPH, Notify, UNetCallBuilder, UNetSettings, UNetVariant
from atedm_bench.unet_rows import measured_rows, ranking_facts
from atedm_bench.unet_variants import OURS, TOMESD
from atedm_bench.whole_runs import WholeRuns
from atedm_kernels.registry import OPS

# The row of what the plug-in costs the host, without any kernel; see `atedm_bench.host`.
HOST = "ours host"

# Rounds of whole runs, each of which takes as long as dozens of calls.
RUN_REPEATS = 3


class UNetBench:
    """Builds the variants and measures them. The rows so far are available at any time."""

    def __init__(self, config: Mapping[str, Any], settings: UNetSettings) -> None:
        self.config = config
        self.settings = settings
        self.variants: list[UNetVariant] = []
        self._built = UNetCallBuilder(config, settings)
        self._failed = self._built.failed
        self._runs: WholeRuns | None = None
        self._graphs = Graphs(settings.device) if settings.device.type == "cuda" else None
        self._host: dict[str, Any] | None = None

    def run(self, notify: Notify = lambda what: None) -> None:
        """Measure everything. Calls ``notify`` with what comes next, :meth:`work` times.

        Raises:
            ValueError, TypeError: the settings do not fit the UNet.
        """
        start = time.monotonic()
        parts = 1 + bool(self.settings.compiled) + bool(self.settings.run_steps)
        share = 60 * self.settings.minutes / parts
        with torch.no_grad():
            self._built.build(notify)
            for is_compiled in (False, True) if self.settings.compiled else (False,):
                self._measure(self._built.calls(compiled=is_compiled), start + (1 + is_compiled) * share, notify)
            if self.settings.run_steps:
                self._run_whole(start + parts * share, notify)
        if OURS in self.settings.calls:
            notify(f"{HOST}: without kernels")
            rounds = min(max(self.settings.repeats, host.MIN_ROUNDS), host.MAX_ROUNDS)
            self._host = host.host_seconds(self.config, self.settings.ratio, rounds)

    def work(self) -> int:
        """How often :meth:`run` calls ``notify`` if nothing fails and time allows every round."""
        repeats, kinds = self.settings.repeats, len(self.settings.calls)
        calls = kinds * (2 if self.settings.compiled else 1)
        graphs = calls if self.settings.device.type == "cuda" else 0
        runs = len(self.settings.runs) * (1 + RUN_REPEATS)
        return 3 + calls * (2 + repeats) + graphs * repeats + runs + (OURS in self.settings.calls)

    def _measure(self, variants: list[UNetVariant], end: float, notify: Notify) -> None:
        """Warm up ``variants``, time them round by round, then inspect them."""
        self.variants += variants
        for variant in list(variants):
            notify(f"{variant.name}: warming up")
            if not self._warm_up(variant):
                variants.remove(variant)
                self.variants.remove(variant)
            elif self._graphs is not None:
                variants += self._captured(variant)
        done = 0
        while done < self.settings.repeats and _has_time(variants, end - time.monotonic()):
            for variant in by_turns(variants, done):
                notify(f"{variant.name}: round {done + 1} of {self.settings.repeats}")
                variant.seconds.append(seconds_of(variant.call, self.settings.device))
            done += 1
        for variant in variants:
            if not variant.graph:
                notify(f"{variant.name}: memory and stages")
                _inspect(variant, self.settings.device)

    def _captured(self, variant: UNetVariant) -> list[UNetVariant]:
        """Return the same call as a CUDA graph; empty if it cannot be captured, as with tomesd's random numbers."""
        try:
            call = self._graphs.capture(variant.call)
        except RuntimeError as error:
            self._failed[variant.name + GRAPH] = error_line(error)
            return []
        name = variant.name + GRAPH
        fields = dict(variant.fields)
        graph = UNetVariant(name, call, variant.unet, fields, variant.is_ours, variant.compiled, graph=True)
        self.variants.append(graph)
        return [graph]

    def _run_whole(self, end: float, notify: Notify) -> None:
        s = self.settings
        self._runs = WholeRuns(
            sharing_weights(self._built.unet),
            self._built.counter,
            **{"steps": s.run_steps, "width": s.width, "height": s.height, "batch": s.batch, "tokens": s.tokens},
            ratio=s.ratio,
            merge_ratio=self._built.merge_ratio,
            only=s.runs,
        )
        self._runs.measure(RUN_REPEATS, end, notify)

    def _warm_up(self, variant: UNetVariant) -> bool:
        """Warm up the variant. Returns whether it runs; if not, its row gives the reason."""
        try:
            if variant.compiled and self.settings.compiled == "whole":
                # An eager call sets the phase of the schedule; a traced call only reads it.
                variant.unet(*self._built.inputs[0], **self._built.inputs[1])
            # A later call uses what the first one allocated, tuned or compiled.
            for _ in range(1 if self.settings.device.type == "cpu" and not variant.compiled else 3):
                variant.call()
        except Exception as error:
            # A failure of a compiler or a peer is a result; an error of atedm in eager mode is not.
            if not variant.compiled and variant.name != TOMESD:
                raise
            self._failed[variant.name] = error_line(error)
            return False
        return True

    def rows(self) -> list[dict[str, Any]]:
        """Return one flat object per variant, then DSAP's average over a run, the host's work, and what failed."""
        rows = measured_rows(self.variants, self.settings.steps)
        failed = dict(self._failed)
        if self._runs is not None:
            rows += self._runs.rows()
            failed |= self._runs.failed
        if self._host is not None:
            rows.append({"name": HOST, **self._host})
        return rows + [{"name": name, "error": error} for name, error in failed.items()]

    def settings_for_report(self) -> dict[str, Any]:
        """Everything that the figures depend on."""
        s = self.settings
        return {
            **{"device": str(s.device), "dtype": str(s.dtype).removeprefix("torch."), "size": f"{s.width}x{s.height}"},
            **{"batch": s.batch, "tokens": s.tokens, "ratio": s.ratio, "steps": s.steps, "repeats": s.repeats},
            "run_steps": s.run_steps,
            **{
                "rounds": max((len(variant.seconds) for variant in self.variants), default=0),
                "minutes": s.minutes,
                "seed": s.seed,
                "threads": torch.get_num_threads(),
            },
            "memory_format": "channels_last" if s.channels_last else "contiguous",
            "compile": s.compiled,
            "compile_mode": s.compile_mode if s.compiled else None,
            "tomesd": "max_downsample=4, merge_attn, merge_crossattn, merge_mlp, at the FLOPs nearest to ours",
            "stage_clock": "device" if s.device.type == "cuda" else "cpu",
            "memory": "allocated on the device" if s.device.type == "cuda" else "resident in the process",
            "backends": {name: op.backend_for(s.device, s.dtype)[0] for name, op in OPS.items()},
            **self._built.described(),
        }


def _has_time(variants: list[UNetVariant], seconds: float) -> bool:
    """Whether a round and then the inspection (two calls each) fit into ``seconds``; the first round always runs."""
    if not all(variant.seconds for variant in variants):
        return True
    return 3 * sum(statistics.fmean(variant.seconds) for variant in variants) < seconds


def _inspect(variant: UNetVariant, device: torch.device) -> None:
    """Add the memory and the stages of a call to the fields of ``variant``."""
    # One call serves both: recording copies only a few kilobytes.
    records = variant.is_ours and not variant.compiled
    with atedm.record(variant.unet) if records else contextlib.nullcontext() as recording:
        variant.fields["peak_memory_bytes"] = peak_memory_of(variant.call, device)
    if not variant.is_ours:
        return
    if recording is not None:
        variant.fields.update(ranking_facts(recording))
        variant.fields["remembered_bytes"] = recording.memory_bytes
    ops = op_seconds_of(variant.call, device)
    for stage, names in STAGES.items():
        variant.fields[f"stage_{stage}_seconds"] = sum(ops.get(name, 0.0) for name in names) if ops else None
    if ops and variant.seconds:
        stages = sum(variant.fields[f"stage_{stage}_seconds"] for stage in STAGES if stage != "attention")
        variant.fields["stages_part_of_seconds"] = stages / statistics.median(variant.seconds)
