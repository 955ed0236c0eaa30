"""The ways of running a UNet that ``atedm-bench unet`` compares, and their FLOPs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import torch
from diffusers import EulerDiscreteScheduler
from torch import Tensor, nn

import atedm
from atedm.app.flops import Flops, UNetFlops
from atedm.policy.options import BY_KEYS, PUBLISHED, Options
from atedm_bench.peers import apply_tomesd
from atedm_bench.rankings import no_ranking

FULL, TOMESD = "full", "tomesd"
OURS, LIGHT, PAPER = "ours", "ours DSAP light phase", "ours paper placement"
REUSED, KEYS, CACHED = "ours tokens chosen before", "ours by keys", "ours cached updates"

# Every block is pruned; tokens are ranked and recovered as published.
_PUBLISHED = replace(PUBLISHED, schedule=None)

# Every call but LIGHT is of the phase that prunes every block.
_OPTIONS: Mapping[str, Options] = MappingProxyType(
    {
        OURS: _PUBLISHED,
        LIGHT: replace(_PUBLISHED, schedule=atedm.DSAP(fraction=1.0)),
        PAPER: replace(_PUBLISHED, placement="paper"),
        REUSED: replace(_PUBLISHED, rank_every=1000),
        KEYS: replace(_PUBLISHED, **BY_KEYS),
        CACHED: replace(_PUBLISHED, recovery="cached", staleness="drift"),
    }
)
VARIANTS = (FULL, *_OPTIONS, TOMESD)


def is_ours(name: str) -> bool:
    return name in _OPTIONS


def count(counter: UNetFlops, name: str, ratio: float) -> Flops:
    """Return the FLOPs of a call of any variant except tomesd, which has its own ratio."""
    if name == FULL:
        return counter.full()
    options = replace(_OPTIONS[name], ratio=ratio)
    if name == REUSED:  # no ranking runs in a call that reuses an earlier choice
        options = replace(options, ranking=no_ranking)
    return counter.of_kind(options, "light" if name == LIGHT else "pruned")


class Steps:
    """Gives a scheduler's timesteps one by one, as views of its own tensor, so that no value is read from the GPU."""

    def __init__(self, device: torch.device) -> None:
        self.scheduler = EulerDiscreteScheduler()
        self.scheduler.set_timesteps(1000, device=device)
        self._next = 0

    def __call__(self) -> Tensor:
        self._next += 1
        return self.scheduler.timesteps[(self._next - 1) % 1000]


def patch(unet: nn.Module, name: str, ratio: float, merge_ratio: float) -> Steps | None:
    """Make ``unet`` run as variant ``name``. Returns a source of timesteps if the calls need different ones."""
    if name == TOMESD:
        apply_tomesd(unet, merge_ratio)
    elif name in _OPTIONS:
        steps = Steps(unet.device) if name in (REUSED, CACHED) else None  # these remember a picture, so need its steps
        atedm.apply(unet, _OPTIONS[name], ratio=ratio, scheduler=None if steps is None else steps.scheduler)
        return steps
    return None


def described(name: str, ratio: float, merge_ratio: float) -> dict[str, Any]:
    """Return the fields that describe a variant in its row."""
    options = _OPTIONS.get(name)
    return {
        "ratio": {FULL: None, TOMESD: merge_ratio}.get(name, ratio),
        "placement": None if options is None else options.placement,
        "phase": None if options is None else "light" if name == LIGHT else "all pruned",
    }
