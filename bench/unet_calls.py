"""Builds the calls that ``atedm-bench unet`` compares. They share the weights of one UNet with random weights."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from atedm.app.flops import Flops, UNetFlops
from atedm.app.models import unet_inputs
from atedm_bench.peers import tomesd_flops
from atedm_bench.random_unet import attention_kernels, calibrate_attention, random_unet, sharing_weights
from atedm_bench.unet_variants import FULL, OURS, TOMESD, VARIANTS, count, described, is_ours, patch
from atedm_bench.whole_runs import RUNS
from atedm_bench.whole_runs import TOMESD as TOMESD_RUN

# Name suffix of variants that run compiled.
COMPILED = " compiled"
# Name suffix of variants that run as a CUDA graph, which excludes the host's work.
GRAPH = " graph"

Notify = Callable[[str], None]


@dataclass(frozen=True)
class UNetSettings:
    """What is measured.

    Attributes:
        device, dtype: of weights and activations. width, height: image size in pixels. batch: images per call.
        tokens: text tokens. ratio: fraction of the tokens that ours drops. steps: length of the run over which DSAP is
            averaged. repeats: rounds.
        minutes: time limit for the whole run. A round starts only if it, and what follows the rounds, can end in time;
            the first round always runs.
        compiled: also measure each variant compiled: ``"whole"`` by ``torch.compile``, or ``"regional"``, only the
            transformer layers, as diffusers' ``compile_repeated_blocks`` does (minutes faster). This runs after the
            other variants and gets an equal part of the time.
        compile_mode: mode of ``torch.compile``. channels_last: memory format of the convolutions.
        run_steps: also time whole runs of this many steps; 0 for none.
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

    @property
    def calls(self) -> tuple[str, ...]:
        """The names of the variants of a call to measure."""
        return tuple(name for name in VARIANTS if name in self.only or not self.only)

    @property
    def runs(self) -> tuple[str, ...]:
        """The names of the whole runs to time."""
        return tuple(name for name in RUNS if self.run_steps and (name in self.only or not self.only))


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


class UNetCallBuilder:
    """The UNet, its inputs and its calls.

    Attributes:
        unet, inputs, counter: the UNet, the arguments of a call and the FLOP counter; not set before :meth:`build`.
        merge_ratio: tomesd's ratio, at the FLOPs nearest to ours. failed: by name, why a call could not be built.
    """

    def __init__(self, config: Mapping[str, Any], settings: UNetSettings) -> None:
        self.config = config
        self.settings = settings
        self.unet: nn.Module | None = None
        self.inputs: tuple[tuple, dict[str, Any]] = ((), {})
        self.counter: UNetFlops | None = None
        self.merge_ratio = 0.0
        self.failed: dict[str, str] = {}
        self._facts: dict[str, Any] = {}
        self._flops: dict[str, Flops] = {}

    def build(self, notify: Notify) -> None:
        s = self.settings
        notify("counting FLOPs")
        self.counter = UNetFlops(self.config, width=s.width, height=s.height, batch=s.batch, tokens=s.tokens)
        self._flops = self._count(self.counter)
        notify("building the UNet")
        unet = random_unet(self.config, dtype=s.dtype, device=s.device, channels_last=s.channels_last, seed=s.seed)
        self._facts["parameters"] = sum(parameter.numel() for parameter in unet.parameters())
        notify("calibrating its attention")
        positional, kwargs = unet_inputs(
            unet, width=s.width, height=s.height, batch=s.batch, tokens=s.tokens, seed=s.seed
        )
        spread = calibrate_attention(unet, lambda: unet(*positional, **kwargs))
        self._facts.update(
            {
                "weights": "random normal, variance 1/fan_in; to_q and to_k of self-attention scaled",
                "logit_std": statistics.fmean(spread),
                "logit_std_low": min(spread),
                "logit_std_high": max(spread),
                "inputs": "seeded standard normal",
            }
        )
        self.inputs = (positional, kwargs)
        self.unet = unet

    def calls(self, *, compiled: bool) -> list[UNetVariant]:
        """Build the calls in the settings. The eager full call runs :attr:`unet` itself, others share its weights."""
        names = [name for name in self.settings.calls if name not in self.failed]
        return [self._call(name, compiled) for name in names]

    def _count(self, counter: UNetFlops) -> dict[str, Flops]:
        ratio = self.settings.ratio
        flops = {name: count(counter, name, ratio) for name in {FULL, OURS, *self.settings.calls} - {TOMESD}}
        if TOMESD not in self.settings.calls and TOMESD_RUN not in self.settings.runs:
            return flops
        try:
            merged = tomesd_flops(counter)
            self.merge_ratio = merged.nearest_ratio(flops[OURS].unet)
            flops[TOMESD] = merged.at(self.merge_ratio)
        except RuntimeError as error:
            self.failed[TOMESD] = str(error)
        return flops

    def _call(self, kind: str, compiled: bool) -> UNetVariant:
        unet = self.unet if kind == FULL and not compiled else sharing_weights(self.unet)
        run, ratios = unet, (self.settings.ratio, self.merge_ratio)
        if compiled and kind != TOMESD:  # tomesd looks for its layers in a diffusers UNet, not in a wrapper
            run = self._compile(kind, unet)
        steps = patch(run, kind, *ratios)
        if compiled and kind == TOMESD:
            run = self._compile(kind, unet)
        (sample, timestep, text), kwargs = self.inputs
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
        return UNetVariant(name, call, unet, fields, is_ours(kind), compiled)

    def _compile(self, kind: str, unet: nn.Module) -> Callable[..., object]:
        # Shapes never change here. tomesd creates a random generator inside its layers, which a graph cannot contain.
        options = {"mode": self.settings.compile_mode, "fullgraph": kind != TOMESD, "dynamic": False}
        # torch counts the graphs of all variants together, because they run the same code; each may need several.
        torch._dynamo.config.recompile_limit = 64
        if self.settings.compiled == "regional":
            # tomesd renames the class of the layers, so diffusers' compile_repeated_blocks does not find them.
            for module in unet.modules():
                if type(module).__name__ in ("BasicTransformerBlock", "ToMeBlock"):
                    module.compile(**options)
            return unet
        return torch.compile(unet, **options)

    def described(self) -> dict[str, Any]:
        """Return the facts about the weights, the inputs and the attention kernels, for the report."""
        s = self.settings
        if self.unet is None:
            return self._facts
        return {**attention_kernels(self.unet, s.width, s.height, s.batch), **self._facts}
