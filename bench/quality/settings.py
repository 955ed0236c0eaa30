"""The settings that the lab compares, by name and group: presets, peers, a plane of our options, the paper's method."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial

import atedm
from atedm.app.flops import MAX_RATIO, solve_decreasing
from atedm.policy.options import PUBLISHED, Options
from atedm_bench.methods import Costs, DeepCache, Method, Ours, RandomTokens, ToMe
from atedm_bench.peers import tomesd_flops

# The paper's tables: TFLOPs of a call that prunes every block, relative to 6.7 for the full UNet.
BUDGETS = {"a": 2.9 / 6.7, "b": 3.6 / 6.7, "c": 4.1 / 6.7, "d": 4.5 / 6.7}
MAIN = "c"

# Percentages of the full UNet's FLOPs at which the peers, and our settings that only drop tokens, are compared.
SHARES = (65, 55, 50)
TOKEN_SHARES = (65, 55)
INTERVALS = (2, 3, 5)

# Dropped tokens keep their own last update. Without a schedule, every step but the first is pruned.
_CACHED = replace(PUBLISHED, schedule=None, recovery="cached")
_RANKINGS = {"drift": None, "PageRank × drift": "self", "keys × drift": "keys"}
TOKENS = {name: replace(_CACHED, ranking=ranking, staleness="drift") for name, ranking in _RANKINGS.items()}

_PLANE = {
    **{f"reuse {tolerance}": Options(schedule=atedm.Adaptive(tolerance)) for tolerance in (0.1, 0.2, 0.3, 0.5)},
    **{f"reuse every {n}": Options(schedule=atedm.Every(n)) for n in (2, 3)},
    **{
        f"{name} + reuse {tolerance}": replace(
            TOKENS[name], schedule=atedm.Adaptive(tolerance, pruned_from=0.3, whole_every=2)
        )
        for name in ("drift", "PageRank × drift")
        for tolerance in (0.1, 0.2, 0.3)
    },
}

# Replacements for one part of the published method, at the ratio of ours at MAIN.
_ABLATIONS = {
    "recovery: zeros": {"recovery": "zeros"},
    "recovery: bicubic": {"recovery": "bicubic"},
    "recovery: keys": {"recovery": "keys"},
    "ranking: cross-attention": {"ranking": "cross"},
}

# Replacements at the ratio that gives the FLOPs of ours at MAIN.
_AT_EQUAL_FLOPS = {"DSAP off": {"schedule": None}, "level 2 whole": {"levels": (3,)}}


@dataclass(frozen=True)
class Setting:
    """One row of the table. ``group``: the part of the table to which it belongs."""

    name: str
    group: str
    method: Method
    note: str = ""

    @property
    def folder(self) -> str:
        """The setting's name as a folder name."""
        return _plain(self.name)


def _plain(name: str) -> str:
    words = "".join(c if c.isalnum() else " " for c in name.replace("×", "x")).split()
    return "-".join(words)


FULL = Setting("full", "full", Method())

_Build = Callable[[], tuple[Method, str]]


class Plan:
    """Every setting of a run, by group and name. Ratios are solved for on demand, on the UNet that ``costs`` counts.

    Groups: ``presets``, which include the default; ``peers``; ``plane``, our options varied by schedule, ratio and
    ranking; ``budget``, the published method at the paper's four budgets, with tomesd and random tokens at the same
    FLOPs; ``ablation``, the published method at budget ``MAIN`` with one part replaced; ``tried``, the caller's own
    settings. FLOPs are those of the mean call of a run. Only for a budget are they, as in the paper, those of a call
    that prunes every block.
    """

    def __init__(self, costs: Costs, tried: Mapping[str, Options] | None = None) -> None:
        self.costs = costs
        self.full = costs.counter.full().unet
        self.groups: dict[str, dict[str, _Build]] = {
            "presets": self._fixed(atedm.PRESETS),
            "peers": self._peers(),
            "plane": self._plane(),
            "budget": self._budgets(),
            "ablation": self._ablations(),
            "tried": self._fixed(tried or {}),
        }

    def settings(self, wanted: Sequence[str] | None = None) -> list[Setting]:
        """Return the full model, the settings that ``wanted`` lists by name or group, and all that are tried.

        Without ``wanted``, return all settings, or only the tried ones if there are any.

        Raises:
            ValueError: a name is unknown, ``wanted`` is empty, or two settings have one name.
        """
        names = ["full", *(name for group in self.groups.values() for name in group)]
        folders = [_plain(name) for name in names]
        for name in self.groups["tried"]:
            if not _plain(name) or folders.count(_plain(name)) > 1:
                raise ValueError(f"try names {name!r}, which is not distinct from another setting; expected a new name")
        expected = ", ".join([*self.groups, *map(repr, names)])
        if wanted is not None and not wanted:
            raise ValueError(f"settings names none; expected some of {expected}")
        for word in wanted or ():
            if word not in names and word not in self.groups:
                raise ValueError(f"settings names {word!r}; expected some of {expected}")
        if wanted is None:
            wanted = ["tried"] if self.groups["tried"] else list(self.groups)
        return [FULL] + [
            Setting(name, group, *build())
            for group, of_group in self.groups.items()
            for name, build in of_group.items()
            if group == "tried" or group in wanted or name in wanted
        ]

    def _fixed(self, options: Mapping[str, Options]) -> dict[str, _Build]:
        return {name: lambda each=each: (Ours(each), "") for name, each in options.items()}

    def _peers(self) -> dict[str, _Build]:
        found: dict[str, _Build] = {f"DeepCache {n}": lambda n=n: (DeepCache(n), "") for n in INTERVALS}
        for share in SHARES:
            target = share / 100 * self.full
            found[f"tomesd {share} %"] = partial(self._tomesd, target)
            found[f"random {share} %"] = partial(self._at, target, _CACHED, RandomTokens)
        return found

    def _plane(self) -> dict[str, _Build]:
        tokens = {
            f"{name} {share} %": partial(self._at, share / 100 * self.full, options)
            for name, options in TOKENS.items()
            for share in TOKEN_SHARES
        }
        return {**tokens, **self._fixed(_PLANE)}

    def _budgets(self) -> dict[str, _Build]:
        found: dict[str, _Build] = {}
        for budget in BUDGETS:
            found[f"ours {budget}"] = partial(self._ours, budget)
            found[f"tomesd {budget}"] = lambda budget=budget: self._tomesd(self._mean(self._ours(budget)[0].options))
            found[f"random {budget}"] = lambda budget=budget: (RandomTokens(self._ours(budget)[0].options), "")
        return found

    def _ablations(self) -> dict[str, _Build]:
        found: dict[str, _Build] = {
            name: lambda changes=changes: (Ours(replace(self._main, **changes)), "")
            for name, changes in _ABLATIONS.items()
        }
        for name, changes in _AT_EQUAL_FLOPS.items():
            found[name] = lambda changes=changes: self._at(self._mean(self._main), replace(PUBLISHED, **changes))
        return found

    @cached_property
    def _main(self) -> Options:
        return self._ours(MAIN)[0].options

    def _ours(self, budget: str) -> tuple[Ours, str]:
        return self._solved(
            BUDGETS[budget] * self.full, PUBLISHED, lambda options: self.costs.counter.of_kind(options, "pruned").unet
        )

    def _at(self, target: float, options: Options, method: type[Ours] = Ours) -> tuple[Ours, str]:
        """Return ``options`` at the ratio with which the mean call of a run has ``target`` FLOPs."""
        return self._solved(target, options, self._mean, method)

    def _mean(self, options: Options) -> int:
        return self.costs.counter.mean(options, options.kinds_of(self.costs.steps)).unet

    def _solved(
        self, target: float, options: Options, count: Callable[[Options], int], method: type[Ours] = Ours
    ) -> tuple[Ours, str]:
        def of_ratio(ratio: float) -> int:
            return count(replace(options, ratio=ratio))

        if of_ratio(MAX_RATIO) > target:
            return method(replace(options, ratio=MAX_RATIO)), "these FLOPs are out of reach; this is the largest ratio"
        return method(replace(options, ratio=solve_decreasing(of_ratio, target, 0.0, MAX_RATIO))), ""

    def _tomesd(self, target: float) -> tuple[ToMe, str]:
        merged = tomesd_flops(self.costs.counter)
        ratio = merged.nearest_ratio(target)
        is_near = abs(merged.at(ratio).unet / target - 1) < 0.02
        return ToMe(ratio), "" if is_near else "tomesd cannot get closer to these FLOPs"
