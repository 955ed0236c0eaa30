"""Full against pruned against merged: one call of a UNet with random weights, all variants in one run; then whole runs.

The variants are UNet objects that share one copy of the weights, so they take turns without being patched in between.
They run round robin, and each round starts with a different variant, so that a machine that slows down slows all of
them. A row gives the median over the rounds.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

import atedm
from atedm.app.flops import STAGES, Flops, UNetFlops
from atedm.app.models import unet_inputs
from atedm_bench import host
from atedm_bench.measure import Graphs, by_turns, error_line, op_seconds_of, peak_memory_of, seconds_of
from atedm_bench.peers import tomesd_flops
from atedm_bench.random_unet import attention_kernels, calibrate_attention, random_unet, sharing_weights
from atedm_bench.unet_rows import average_row, ranking_facts
from atedm_bench.unet_variants import FULL, OURS, TOMESD, VARIANTS, count, described, is_ours, patch
from atedm_bench.whole_runs import RUNS, WholeRuns
from atedm_bench.whole_runs import TOMESD as TOMESD_RUN
from atedm_kernels.registry import OPS

# What the plug-in costs the host, every kernel left out; see `atedm_bench.host`.
HOST = "ours host"

# Rounds of whole runs, each of which takes as long as dozens of calls.
RUN_REPEATS = 3

# Name suffixes of variants that run compiled, or as a CUDA graph, which excludes the host's work.
COMPILED, GRAPH = " compiled", " graph"
# And how a row names its speed-up over the full UNet that runs likewise.
_SUFFIXES = {
    "": "",
    COMPILED: "_over_full_compiled",
    GRAPH: "_over_full_graph",
    COMPILED + GRAPH: "_over_full_compiled_graph",
}

Notify = Callable[[str], None]


@dataclass(frozen=True)
class UNetSettings:
    """What is measured.

    Attributes:
        device, dtype: of weights and activations. width, height: of the image in pixels. batch: images per call.
        tokens: of the text. ratio: fraction of the tokens that ours drops. steps: of the run that DSAP's average is
            for. repeats: rounds.
        minutes: for the whole run. A round starts only if it, and what follows the rounds, can end in time; the first
            round always runs.
        compiled: also measure each variant compiled: ``"whole"`` by ``torch.compile``, or ``"regional"``, only the
            transformer layers, as diffusers' ``compile_repeated_blocks`` does (minutes faster). This runs after the
            other variants and gets an equal part of the time.
        compile_mode: of ``torch.compile``. channels_last: memory format of the convolutions.
        run_steps: also time whole runs of so many steps; 0 for none.
        only: names of variants, of calls and of whole runs; empty for all.
    """

    device: torch.device
    dtype: torch.dtype
    width: int = 1024
    height: int = 1024
    batch: int = 1
    tokens: int = 77
    ratio: float = 0.63
    steps: int = 50
    repeats: int = 5
    minutes: float = 9.0
    compiled: str | None = None
    compile_mode: str = "default"
    channels_last: bool = True
    run_steps: int = 0
    only: tuple[str, ...] = ()
    seed: int = 0


@dataclass
class UNetVariant:
    """One way to run the UNet; ``fields`` go into its row."""

    name: str
    call: Callable[[], object]
    unet: nn.Module
    fields: dict[str, Any]
    is_ours: bool = False
    compiled: bool = False
    graph: bool = False
    seconds: list[float] = field(default_factory=list)


class UNetBench:
    """Builds the variants, measures them and returns the rows, which are available at any time."""

    def __init__(self, config: Mapping[str, Any], settings: UNetSettings) -> None:
        self.config = config
        self.settings = settings
        self.variants: list[UNetVariant] = []
        self.facts: dict[str, Any] = {}
        self._inputs: tuple[tuple, dict[str, Any]] = ((), {})
        self._failed: dict[str, str] = {}
        self._merge_ratio = 0.0
        self._unet: nn.Module | None = None
        self._counter: UNetFlops | None = None
        self._flops: dict[str, Flops] = {}
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
            self._build(notify)
            self._measure(list(self.variants), start + share, notify)
            if self.settings.compiled:
                self._measure(self._compiled(), start + 2 * share, notify)
            if self.settings.run_steps:
                self._run_whole(start + parts * share, notify)
        if OURS in self._wanted():
            notify(f"{HOST}: without kernels")
            rounds = max(self.settings.repeats, host.MIN_ROUNDS)
            self._host = host.host_seconds(self.config, self.settings.ratio, rounds)

    def work(self) -> int:
        """How often :meth:`run` calls ``notify`` if nothing fails and time allows every round."""
        repeats, kinds = self.settings.repeats, len(self._wanted())
        calls = kinds * (2 if self.settings.compiled else 1)
        graphs = calls if self.settings.device.type == "cuda" else 0
        runs = len(self._wanted_runs())
        return 3 + calls * (2 + repeats) + graphs * repeats + runs * (1 + RUN_REPEATS) + (OURS in self._wanted())

    def _measure(self, variants: list[UNetVariant], end: float, notify: Notify) -> None:
        """Warm up ``variants``, time them round by round, then inspect them."""
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
                self._inspect(variant)

    def _captured(self, variant: UNetVariant) -> list[UNetVariant]:
        """The same call as a CUDA graph; empty if it cannot be captured, as with tomesd's random numbers."""
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

    def _build(self, notify: Notify) -> None:
        s = self.settings
        notify("counting FLOPs")
        self._counter = UNetFlops(self.config, width=s.width, height=s.height, batch=s.batch, tokens=s.tokens)
        self._flops = self._count(self._counter)
        notify("building the UNet")
        unet = random_unet(self.config, dtype=s.dtype, device=s.device, channels_last=s.channels_last, seed=s.seed)
        self.facts["parameters"] = sum(parameter.numel() for parameter in unet.parameters())
        notify("calibrating its attention")
        positional, kwargs = unet_inputs(
            unet, width=s.width, height=s.height, batch=s.batch, tokens=s.tokens, seed=s.seed
        )
        spread = calibrate_attention(unet, lambda: unet(*positional, **kwargs))
        self.facts.update(
            {
                "weights": "random normal, variance 1/fan_in; to_q and to_k of self-attention scaled",
                "logit_std": statistics.fmean(spread),
                "logit_std_low": min(spread),
                "logit_std_high": max(spread),
                "inputs": "seeded standard normal",
            }
        )
        self._inputs = (positional, kwargs)
        self._unet = unet
        for name in self._buildable():
            self._add(name, unet if name == FULL else sharing_weights(unet), compiled=False)

    def _compiled(self) -> list[UNetVariant]:
        found = []
        for name in self._buildable():
            self._add(name, sharing_weights(self._unet), compiled=True)
            found.append(self.variants[-1])
        return found

    def _run_whole(self, end: float, notify: Notify) -> None:
        s = self.settings
        self._runs = WholeRuns(
            sharing_weights(self._unet),
            self._counter,
            **{"steps": s.run_steps, "width": s.width, "height": s.height, "batch": s.batch, "tokens": s.tokens},
            ratio=s.ratio,
            merge_ratio=self._merge_ratio,
            only=self._wanted_runs(),
        )
        self._runs.measure(RUN_REPEATS, end, notify)

    def _wanted(self) -> tuple[str, ...]:
        return tuple(name for name in VARIANTS if name in self.settings.only or not self.settings.only)

    def _wanted_runs(self) -> tuple[str, ...]:
        if not self.settings.run_steps:
            return ()
        return tuple(name for name in RUNS if name in self.settings.only or not self.settings.only)

    def _buildable(self) -> list[str]:
        return [name for name in VARIANTS if name in self._wanted() and name not in self._failed]

    def _count(self, counter: UNetFlops) -> dict[str, Flops]:
        ratio = self.settings.ratio
        flops = {name: count(counter, name, ratio) for name in {FULL, OURS, *self._wanted()} - {TOMESD}}
        if TOMESD not in self._wanted() and TOMESD_RUN not in self._wanted_runs():
            return flops
        try:
            merged = tomesd_flops(counter)
            self._merge_ratio = merged.nearest_ratio(flops[OURS].unet)
            flops[TOMESD] = merged.at(self._merge_ratio)
        except RuntimeError as error:
            self._failed[TOMESD] = str(error)
        return flops

    def _add(self, kind: str, unet: nn.Module, compiled: bool) -> None:
        run, ratios = unet, (self.settings.ratio, self._merge_ratio)
        if compiled and kind != TOMESD:  # tomesd looks for its layers in a diffusers UNet, not in a wrapper
            run = self._compile(kind, unet)
        steps = patch(run, kind, *ratios)
        if compiled and kind == TOMESD:
            run = self._compile(kind, unet)
        (sample, timestep, text), kwargs = self._inputs
        flops = self._flops[kind]
        fields = {
            "tflops": flops.tflops,
            "scoring_tflops": flops.scoring_tflops,
            **described(kind, *ratios),
            "compiled": compiled,
        }

        def call() -> object:
            return run(sample, timestep if steps is None else steps(), text, **kwargs)

        name = kind + COMPILED if compiled else kind
        self.variants.append(UNetVariant(name, call, unet, fields, is_ours(kind), compiled))

    def _compile(self, kind: str, unet: nn.Module) -> Callable[..., object]:
        # Shapes never change here. tomesd creates a random generator inside its layers, which a graph cannot contain.
        options = {"mode": self.settings.compile_mode, "fullgraph": kind != TOMESD, "dynamic": False}
        # The variants share the compiled code, and each may need several graphs of it.
        torch._dynamo.config.recompile_limit = 64
        if self.settings.compiled == "regional":
            # tomesd renames the class of the layers, so diffusers' compile_repeated_blocks does not find them.
            for module in unet.modules():
                if type(module).__name__ in ("BasicTransformerBlock", "ToMeBlock"):
                    module.compile(**options)
            return unet
        return torch.compile(unet, **options)

    def _warm_up(self, variant: UNetVariant) -> bool:
        """Whether the variant runs; if not, its row gives the reason."""
        try:
            if variant.compiled and self.settings.compiled == "whole":
                # An eager call sets the phase of the schedule; a traced call only reads it.
                variant.unet(*self._inputs[0], **self._inputs[1])
            # A second call uses what the first one allocated, tuned or compiled.
            for _ in range(1 if self.settings.device.type == "cpu" and not variant.compiled else 3):
                variant.call()
        except Exception as error:
            # A failure of a compiler or a peer is a result; an error of atedm in eager mode is not.
            if not variant.compiled and variant.name != TOMESD:
                raise
            self._failed[variant.name] = error_line(error)
            return False
        return True

    def _inspect(self, variant: UNetVariant) -> None:
        device = self.settings.device
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

    def rows(self) -> list[dict[str, Any]]:
        """One flat object per variant, then DSAP's average over a run, the host's work, and what failed."""
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
            for variant in self.variants
            if variant.seconds
        ]
        for suffix in _SUFFIXES:
            rows += average_row(rows, suffix, self.settings.steps)
        by_name = {row["name"]: row for row in rows}
        for row in rows:
            for suffix, key in _SUFFIXES.items():
                reference, key = FULL + suffix, "speedup" + key
                row[key] = by_name[reference]["seconds"] / row["seconds"] if reference in by_name else None
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
            **({} if self._unet is None else attention_kernels(self._unet, s.width, s.height, s.batch)),
            "stage_clock": "device" if s.device.type == "cuda" else "cpu",
            "memory": "allocated on the device" if s.device.type == "cuda" else "resident in the process",
            "backends": {name: op.backend_for(s.device, s.dtype)[0] for name, op in OPS.items()},
            **self.facts,
        }


def _has_time(variants: list[UNetVariant], seconds: float) -> bool:
    """Whether a round and then the inspection (two calls each) fit into ``seconds``; the first round always runs."""
    if not all(variant.seconds for variant in variants):
        return True
    return 3 * sum(statistics.fmean(variant.seconds) for variant in variants) < seconds
