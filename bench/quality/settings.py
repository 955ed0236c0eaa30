"""What the lab compares: the full UNet, ours, tomesd and random pruning at four budgets, and the ablations."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

import atedm
from atedm.app.flops import MAX_RATIO, Flops, UNetFlops, solve_decreasing
from atedm.policy.options import BY_KEYS
from atedm_bench.peers import apply_tomesd, tomesd_flops
from atedm_bench.rankings import PooledRanking, RandomRanking, no_ranking

# The paper's tables: TFLOPs of a call that prunes every block, relative to 6.7 for the full UNet.
BUDGETS = {"a": 2.9 / 6.7, "b": 3.6 / 6.7, "c": 4.1 / 6.7, "d": 4.5 / 6.7}
MAIN = "c"
RANK_EVERY = (2, 3, 5)

_COPY_BY_KEYS: dict[str, Any] = {"recovery": "keys"}
_ON_GRID: dict[str, Any] = {**_COPY_BY_KEYS, "grid": 2}
_LEVEL_3: dict[str, Any] = {"levels": (3,)}

# The options among these that change the FLOPs.
_COUNTED = ("levels", "placement", "ranking", "recovery")

# Options of atedm.apply, at the ratio of ours at MAIN.
_ABLATIONS: dict[str, dict[str, Any]] = {
    "recovery: zeros": {"recovery": "zeros"},
    "recovery: bicubic": {"recovery": "bicubic"},
    "recovery: keys": _COPY_BY_KEYS,
    "recovery: keys, with grid": _ON_GRID,
    "by keys, no grid": {"ranking": "keys", "recovery": "keys"},
    "DSAP off, same ratio": {"schedule": None},
    "ranking: cross-attention": {"ranking": "cross"},
    "heads: mean": {"reduction": "mean"},
    "level 2 whole, same ratio": _LEVEL_3,
    "placement: paper": {"placement": "paper"},
}

# At the ratio that gives the FLOPs of ours at MAIN.
_AT_EQUAL_FLOPS: dict[str, dict[str, Any]] = {
    "DSAP off, same FLOPs": {"schedule": None},
    "by keys, DSAP off, same FLOPs": {**BY_KEYS, "schedule": None},
    "level 2 whole, same FLOPs": _LEVEL_3,
    "level 2 whole, DSAP off": {**_LEVEL_3, "schedule": None},
}

# At the ratio of "level 2 whole, same FLOPs".
_AT_LEVEL_3: dict[str, dict[str, Any]] = {
    "level 2 whole, recovery: zeros": {**_LEVEL_3, "recovery": "zeros"},
    "level 2 whole, recovery: bicubic": {**_LEVEL_3, "recovery": "bicubic"},
    "level 2 whole, recovery: keys": {**_LEVEL_3, **_COPY_BY_KEYS},
    "level 2 whole, ranking: cross-attention": {**_LEVEL_3, "ranking": "cross"},
}

# Random pruning, otherwise like ours with these options and at the same ratio.
_RANDOM: dict[str, dict[str, Any]] = {
    "random, recovery: keys": _COPY_BY_KEYS,
    "random, recovery: keys, with grid": _ON_GRID,
    "level 2 whole, random": _LEVEL_3,
}

# Cheaper rankings of level 3 alone; each leaves one ranking in this many.
_CHEAPER: dict[str, tuple[dict[str, Any], int]] = {
    **{f"ranked every {n} steps": ({"rank_every": n}, n) for n in RANK_EVERY},
}
_POOLED = "level 2 ranked on 2×2-pooled maps"


@dataclass(frozen=True)
class Setting:
    """One row of the table.

    Attributes:
        kind: ``"full"``, ``"ours"`` (AT-EDM), ``"keys"`` (ours by keys), ``"tomesd"`` or ``"random"``.
        group: its part of the table: ``"budget"``, ``"ablation"`` or ``"cheaper"``.
        budget: ``"a"`` to ``"d"``; None for the full UNet.
        flops, scoring_flops: of the mean UNet call, for one image.
        options: of :func:`atedm.apply` besides the ratio.
        pooled: maps with this many tokens are ranked on 2×2-pooled queries and keys.
    """

    name: str
    kind: str
    group: str = "budget"
    budget: str | None = None
    ratio: float = 0.0
    flops: int = 0
    scoring_flops: int = 0
    options: dict[str, Any] = field(default_factory=dict)
    pooled: int | None = None
    note: str = ""


class Plan:
    """Every setting of a run. A setting's ratio is solved for on demand, on the UNet that ``flops`` counts.

    A budget is a fraction of the full UNet's FLOPs. As in the paper, it fixes ours by a call that prunes every block.
    tomesd and random pruning get the FLOPs of ours averaged over the ``steps`` steps, including DSAP's light ones, so
    all rows of a budget cost the same. Ablations use budget ``MAIN``, at the ratio or at the FLOPs of ours. Compare
    the cheaper rankings with "level 2 whole, same FLOPs", and the pooled one, which is for level 2, with
    "recovery: keys".

    Args:
        pooled_tokens: tokens of level 2 if its maps are square with even sides, so that they can be ranked pooled.
    """

    def __init__(self, flops: UNetFlops, steps: int, pooled_tokens: int | None = None) -> None:
        self.flops = flops
        self.merged = tomesd_flops(flops)
        self.steps = steps
        self._ours = functools.cache(self._solve_ours)
        self.builders: dict[str, tuple[str, Callable[[str], Setting]]] = {"full": ("budget", self._full)}
        for kind, build in (
            ("ours", self._budget),
            ("keys", self._by_keys),
            ("tomesd", self._tomesd),
            ("random", self._random),
        ):
            self.builders |= {f"{kind} {budget}": ("budget", build) for budget in BUDGETS}
        self.builders |= dict.fromkeys([*_ABLATIONS, *_AT_EQUAL_FLOPS, *_AT_LEVEL_3], ("ablation", self._ablation))
        self.builders |= dict.fromkeys(_RANDOM, ("ablation", self._random_ablation))
        self.builders |= dict.fromkeys(_CHEAPER, ("cheaper", self._cheaper))
        self._pooled_tokens = pooled_tokens
        if pooled_tokens is not None:
            self.builders[_POOLED] = ("cheaper", self._pooled)

    def settings(self, wanted: Sequence[str] | None = None) -> list[Setting]:
        """The settings that ``wanted`` lists by name or group, always with the full model first. Default: all.

        Raises:
            ValueError: a name is unknown.
        """
        groups = {group for group, _ in self.builders.values()}
        for word in wanted or ():
            if word not in self.builders and word not in groups:
                expected = ", ".join([*sorted(groups), *map(repr, self.builders)])
                raise ValueError(f"settings names {word!r}; expected some of {expected}")
        return [
            build(name)
            for name, (group, build) in self.builders.items()
            if wanted is None or name == "full" or name in wanted or group in wanted
        ]

    def _full(self, name: str) -> Setting:
        return Setting(name, "full", flops=self.flops.full().unet)

    def _solve_ours(self, budget: str) -> Setting:
        target = BUDGETS[budget] * self.flops.full().unet
        ratio, reached = _ratio_for(target, lambda r: self.flops.pruned(r).unet)
        mean = self.flops.average(ratio, steps=self.steps)
        note = "" if reached else "the budget is out of reach: the largest ratio"
        return Setting(f"ours {budget}", "ours", "budget", budget, ratio, mean.unet, mean.scoring, note=note)

    def _budget(self, name: str) -> Setting:
        return self._ours(name.split()[1])

    def _by_keys(self, name: str) -> Setting:
        ours = self._ours(name.split()[1])
        mean = self._mean(ours.ratio, BY_KEYS)
        return dataclasses.replace(ours, name=name, kind="keys", scoring_flops=mean.scoring, options=dict(BY_KEYS))

    def _tomesd(self, name: str) -> Setting:
        ours = self._ours(name.split()[1])
        ratio = self.merged.nearest_ratio(ours.flops)
        merged = self.merged.at(ratio)
        note = "" if abs(merged.unet / ours.flops - 1) < 0.02 else "tomesd cannot come closer to ours' FLOPs"
        return Setting(name, "tomesd", "budget", ours.budget, ratio, merged.unet, merged.scoring, note=note)

    def _random(self, name: str) -> Setting:
        ours = self._ours(name.split()[1])
        found = dataclasses.replace(ours, name=name, kind="random")
        return dataclasses.replace(found, scoring_flops=self._without_ranking(found))

    def _ablation(self, name: str) -> Setting:
        if name in _ABLATIONS:
            return self._with(name, _ABLATIONS[name], self._ours(MAIN).ratio)
        if name in _AT_LEVEL_3:
            return self._with(name, _AT_LEVEL_3[name])
        options = _AT_EQUAL_FLOPS[name]
        ratio, reached = _ratio_for(self._ours(MAIN).flops, lambda r: self._mean(r, options).unet)
        note = "" if reached else "ours' FLOPs are out of reach: the largest ratio"
        return self._with(name, options, ratio, note=note)

    def _with(self, name: str, options: Mapping[str, Any], ratio: float | None = None, **fields: Any) -> Setting:
        """An ablation; by default at the ratio of ours, or of level 3 alone if it prunes only that level."""
        if ratio is None:
            ratio = self._level_3.ratio if options.get("levels") == (3,) else self._ours(MAIN).ratio
        mean = self._mean(ratio, options)
        fields = {"kind": "ours", "group": "ablation", "scoring_flops": mean.scoring, **fields}
        return Setting(name, budget=MAIN, ratio=ratio, flops=mean.unet, options=dict(options), **fields)

    @functools.cached_property
    def _level_3(self) -> Setting:
        return self._ablation("level 2 whole, same FLOPs")

    def _random_ablation(self, name: str) -> Setting:
        found = self._with(name, _RANDOM[name], kind="random")
        return dataclasses.replace(found, scoring_flops=self._without_ranking(found))

    def _without_ranking(self, setting: Setting) -> int:
        """The FLOPs of its scoring without the ranking: those of the source map."""
        return self._mean(setting.ratio, {**setting.options, "ranking": no_ranking}).scoring

    def _mean(self, ratio: float, options: Mapping[str, Any]) -> Flops:
        counted = {key: options[key] for key in _COUNTED if key in options}
        if options.get("schedule", True) is None:
            return self.flops.pruned(ratio, **counted)
        return self.flops.average(ratio, steps=self.steps, **counted)

    def _cheaper(self, name: str) -> Setting:
        options, share = _CHEAPER[name]
        found = self._with(name, {**_LEVEL_3, **options}, group="cheaper")
        sources = self._without_ranking(found)
        return dataclasses.replace(found, scoring_flops=sources + (found.scoring_flops - sources) // share)

    def _pooled(self, name: str) -> Setting:
        found = self._with(name, _COPY_BY_KEYS, group="cheaper", pooled=self._pooled_tokens)
        pooled = self._mean(found.ratio, {**found.options, "ranking": PooledRanking(self._pooled_tokens)})
        return dataclasses.replace(found, scoring_flops=pooled.scoring)


def _ratio_for(target: float, count: Callable[[float], float]) -> tuple[float, bool]:
    """The ratio whose FLOPs are nearest to ``target``, and whether it reaches the target."""
    if count(MAX_RATIO) > target:
        return MAX_RATIO, False
    return solve_decreasing(count, target, 0.0, MAX_RATIO), True


@contextlib.contextmanager
def in_force(pipe: Any, setting: Setting) -> Iterator[Callable[[int], None]]:
    """Apply ``setting`` to ``pipe`` while the block runs; yields a function to call with a seed before each batch."""
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
    else:
        options = dict(setting.options)
        if setting.pooled is not None:
            options["ranking"] = PooledRanking(setting.pooled)
        with atedm.applied(pipe, ratio=setting.ratio, **options):
            yield lambda seed: None
