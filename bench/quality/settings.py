"""What the lab compares: the full UNet, ours, tomesd and random pruning at four budgets, and the ablations."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

import atedm
from atedm.bench.quality.rankings import (
    PooledRanking,
    RandomRanking,
    ReusedRanking,
    RunningBlock,
    shared_between_halves,
)
from atedm.flops import MAX_RATIO, UNetFlops, apply_tomesd, solve_decreasing

# The paper's tables: TFLOPs of a call that prunes every block, of 6.7 for the full UNet.
BUDGETS = {"a": 2.9 / 6.7, "b": 3.6 / 6.7, "c": 4.1 / 6.7, "d": 4.5 / 6.7}
MAIN = "c"
REUSED_STEPS = (2, 3, 5)


@dataclass(frozen=True)
class Setting:
    """One row of the table.

    Attributes:
        kind: ``"full"``, ``"ours"``, ``"tomesd"`` or ``"random"``.
        group: the part of the table it belongs to: ``"budget"``, ``"ablation"`` or ``"cheaper"``.
        budget: ``"a"`` to ``"d"``; None for the full UNet.
        flops, scoring_flops: of the mean UNet call, one image.
        options: of :func:`atedm.apply` besides the ratio.
        study: a cheaper ranking: ``"shared"``, ``"pooled"`` or ``"every N"``.
    """

    name: str
    kind: str
    group: str = "budget"
    budget: str | None = None
    ratio: float = 0.0
    flops: int = 0
    scoring_flops: int = 0
    options: dict[str, Any] = field(default_factory=dict)
    study: str | None = None
    note: str = ""


def _average(flops: UNetFlops, ratio: float, steps: int, options: dict[str, Any]) -> Any:
    counted = {key: options[key] for key in ("levels", "placement") if key in options}
    if options.get("schedule", True) is None:
        return flops.pruned(ratio, **counted)
    return flops.average(ratio, steps=steps, **counted)


def _ratio_for(target: float, count: Callable[[float], float]) -> tuple[float, bool]:
    """The ratio whose FLOPs are nearest ``target``, and whether it gets there."""
    if count(MAX_RATIO) > target:
        return MAX_RATIO, False
    return solve_decreasing(count, target, 0.0, MAX_RATIO), True


def all_settings(flops: UNetFlops, steps: int, mapped_tokens: int | None = None) -> list[Setting]:
    """Every setting, its ratio solved for on the UNet that ``flops`` counts.

    A budget is a part of the full UNet's FLOPs and fixes ours as the paper does: by a call that prunes every block.
    tomesd and random pruning get the FLOPs of ours averaged over the ``steps`` steps, DSAP's light ones included, so
    a budget's rows cost the same. Ablations are made at budget ``MAIN`` with ours' ratio, unless their name says
    "same FLOPs".

    Args:
        mapped_tokens: tokens of level 2, which the pooled ranking pools.
    """
    full = flops.full().unet
    found = [Setting("full", "full", flops=full)]
    ours: dict[str, Setting] = {}
    for budget, part in BUDGETS.items():
        ratio, reached = _ratio_for(part * full, lambda r: flops.pruned(r).unet)
        mean = flops.average(ratio, steps=steps)
        note = "" if reached else "the budget is out of reach: the largest ratio"
        ours[budget] = Setting(f"ours {budget}", "ours", "budget", budget, ratio, mean.unet, mean.scoring, note=note)
        found.append(ours[budget])
    for budget, setting in ours.items():
        ratio = flops.nearest_merge_ratio(setting.flops)
        merged = flops.merged(ratio)
        reached = abs(merged.unet / setting.flops - 1) < 0.02
        note = "" if reached else "tomesd cannot come closer to ours' FLOPs"
        found.append(
            Setting(f"tomesd {budget}", "tomesd", "budget", budget, ratio, merged.unet, merged.scoring, note=note)
        )
    for budget, setting in ours.items():
        found.append(Setting(f"random {budget}", "random", "budget", budget, setting.ratio, setting.flops))
    return found + _ablations(flops, steps, ours[MAIN]) + _cheaper(ours[MAIN], mapped_tokens)


def _ablations(flops: UNetFlops, steps: int, main: Setting) -> list[Setting]:
    found = []

    def add(name: str, ratio: float = main.ratio, note: str = "", **options: Any) -> None:
        mean = _average(flops, ratio, steps, options)
        found.append(Setting(name, "ours", "ablation", main.budget, ratio, mean.unet, mean.scoring, options, note=note))

    def same_flops(**options: Any) -> tuple[float, str]:
        ratio, reached = _ratio_for(main.flops, lambda r: _average(flops, r, steps, options).unet)
        return ratio, "" if reached else "ours' FLOPs are out of reach: the largest ratio"

    add("recovery: zeros", recovery="zeros")
    add("recovery: bicubic", recovery="bicubic")
    add("DSAP off, same ratio", schedule=None)
    ratio, note = same_flops(schedule=None)
    add("DSAP off, same FLOPs", ratio, note, schedule=None)
    add("ranking: cross-attention", ranking="cross")
    add("heads: mean", reduction="mean")
    add("level 2 whole, same ratio", levels=(3,))
    ratio, note = same_flops(levels=(3,))
    add("level 2 whole, same FLOPs", ratio, note, levels=(3,))
    add("placement: paper", placement="paper")
    return found


def _cheaper(main: Setting, mapped_tokens: int | None) -> list[Setting]:
    studies = {f"ranked every {n} steps": f"every {n}" for n in REUSED_STEPS}
    studies["one ranking for both halves of guidance"] = "shared"
    if mapped_tokens is not None:
        studies["level 2 ranked on 2×2-pooled maps"] = "pooled"
    return [
        Setting(
            name,
            "ours",
            "cheaper",
            main.budget,
            main.ratio,
            main.flops,
            main.scoring_flops,
            study=study if study != "pooled" else f"pooled {mapped_tokens}",
        )
        for name, study in studies.items()
    ]


@contextlib.contextmanager
def in_force(pipe: Any, setting: Setting) -> Iterator[Callable[[int], None]]:
    """``setting`` applied to ``pipe`` while the block runs; yields what to call with a seed before each batch."""
    if setting.kind == "full":
        yield lambda seed: None
    elif setting.kind == "tomesd":
        import tomesd

        apply_tomesd(pipe.unet, setting.ratio)
        try:
            # tomesd draws from a fork of the global generator.
            yield lambda seed: torch.manual_seed(seed) and None
        finally:
            tomesd.remove_patch(pipe.unet)
    elif setting.kind == "random":
        ranking = RandomRanking()

        def restart(seed: int) -> None:
            ranking.seed = seed
            ranking.restart()

        with atedm.applied(pipe, ratio=setting.ratio, ranking=ranking, **setting.options):
            yield restart
    elif setting.study is not None and setting.study.startswith("every"):
        with RunningBlock(pipe.unet) as running:
            reused = ReusedRanking(running, int(setting.study.split()[1]))
            with atedm.applied(pipe, ratio=setting.ratio, ranking=reused, **setting.options):
                yield lambda seed: reused.restart()
    else:
        options = dict(setting.options)
        if setting.study == "shared":
            options["ranking"] = shared_between_halves
        elif setting.study is not None:
            options["ranking"] = PooledRanking(int(setting.study.split()[1]))
        with atedm.applied(pipe, ratio=setting.ratio, **options):
            yield lambda seed: None
