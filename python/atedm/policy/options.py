"""The options of :func:`atedm.apply`, checked once; presets; options as JSON."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from atedm.files import whole_file
from atedm.policy.adaptive import Adaptive
from atedm.policy.placement import PLACEMENTS
from atedm.policy.ranking import RANKINGS, RankingFunction, make_ranking
from atedm.policy.recovery import RECOVERIES
from atedm.policy.schedule import DSAP, PRUNING, Listed, Schedule
from atedm.policy.schedules import as_schedule, schedule_from_json, schedule_to_json
from atedm.policy.staleness import STALENESS
from atedm_kernels import DEFAULT_MAX_ITERATIONS, DEFAULT_TOLERANCE, MAX_COUNT, MAX_FLOAT32, REDUCTIONS
from atedm_kernels.registry import plain_number

# Ranking and recovery by keys, with a grid: our alternative to the paper's, see :mod:`atedm.policy.ranking`.
BY_KEYS: Mapping[str, Any] = MappingProxyType({"ranking": "keys", "recovery": "keys", "grid": 2})

# The ratio of the paper's main configuration: 4.1 TFLOPs per call of SDXL's UNet with the paper's placement.
DEFAULT_RATIO = 0.63

# From 30 % of the run on, every other computed step is pruned.
DEFAULT_SCHEDULE = Adaptive(0.27, pruned_from=0.3)


def _one_of(name: str, value: object, allowed: Collection[str | None]) -> None:
    if value not in tuple(allowed):  # compared by equality, because a list cannot be hashed
        raise ValueError(f"{name} is {value!r}; expected one of {', '.join(map(repr, allowed))}")


def _check_ratio(name: str, ratio: object) -> None:
    if isinstance(ratio, bool) or not isinstance(ratio, (int, float)):
        raise TypeError(f"{name} is {ratio!r}; expected a number from 0 up to, not including, 1")
    if not 0 <= ratio < 1:
        raise ValueError(f"{name} is {ratio}; expected from 0 up to, not including, 1: the part of the tokens to drop")


@dataclass(frozen=True)
class Options:
    """The settings of a pruned UNet: the arguments of :func:`atedm.apply`, which documents them.

    Raises:
        TypeError, ValueError: a value is invalid; the message begins with its name.
    """

    ratio: float | Mapping[int, float] = DEFAULT_RATIO
    levels: tuple[int, ...] | None = None
    schedule: Schedule | Sequence[str] | None = DEFAULT_SCHEDULE
    placement: str = "early"
    ranking: str | RankingFunction | None = "self"
    recovery: str = "cached"
    reduction: str = "rms"
    keep_multiple: int = 1
    max_iterations: int = DEFAULT_MAX_ITERATIONS
    tolerance: float = DEFAULT_TOLERANCE
    grid: int | None = None
    rank_every: int = 1
    staleness: str | None = "drift"
    warm_start: bool = True

    def __post_init__(self) -> None:
        for each in fields(self):
            object.__setattr__(self, each.name, plain_number(getattr(self, each.name)))
        if isinstance(self.ratio, Mapping):
            plain = {plain_number(level): plain_number(ratio) for level, ratio in self.ratio.items()}
            object.__setattr__(self, "ratio", plain)
        if isinstance(self.levels, Iterable) and not isinstance(self.levels, (str, Mapping)):
            object.__setattr__(self, "levels", tuple(map(plain_number, self.levels)))
        object.__setattr__(self, "schedule", as_schedule(self.schedule))
        _check(self)
        object.__setattr__(self, "tolerance", float(self.tolerance))  # ops take no integer beyond 64 bits

    @property
    def steps(self) -> Schedule:
        """The schedule; without one, every step is pruned.

        A ratio of 0 is for comparison, so under the default schedule it reuses nothing either.
        """
        is_to_compare = self.ratio == 0 and self.schedule == DEFAULT_SCHEDULE
        return Listed(("pruned",)) if self.schedule is None or is_to_compare else self.schedule

    @property
    def prunes(self) -> bool:
        """Whether any step drops tokens."""
        return bool(self.steps.kinds & PRUNING)

    @property
    def starts_warm(self) -> bool:
        """Whether a ranking starts from the scores of an earlier step of the picture."""
        ranking = make_ranking(self.ranking, self.max_iterations, self.tolerance)
        return self.warm_start and self.prunes and ranking is not None and ranking.iterates

    @property
    def follows_pictures(self) -> bool:
        """Whether anything is kept from one step of a picture to the next."""
        return self.remembers or self.starts_warm or self.rank_every > 1 or self.steps.reads_past

    @property
    def remembers(self) -> bool:
        """Whether a step needs what an earlier one computed, so that the first step of a picture must be whole."""
        by_blocks = self.prunes and (RECOVERIES[self.recovery].remembers or self.staleness is not None)
        return by_blocks or "reused" in self.steps.kinds

    @property
    def kinds(self) -> frozenset[str]:
        """All kinds that the steps of a run may have."""
        return self.steps.kinds | ({"whole"} if self.remembers else set())

    def kinds_of(self, steps: int) -> list[str]:
        """The kinds of a run of ``steps`` steps.

        Raises:
            ValueError: the schedule chooses the kinds during the run.
        """
        kinds = self.steps.planned(steps)
        if kinds is None:
            raise ValueError(f"schedule is {self.schedule!r}, which chooses as it runs; expected a fixed one")
        return ["whole", *kinds[1:]] if self.remembers else kinds

    @property
    def constant_kind(self) -> str | None:
        """The kind of every step, if all calls of a UNet are alike, whatever their step and pipeline; else None."""
        return None if self.follows_pictures else self.steps.constant

    @property
    def is_constant(self) -> bool:
        return self.constant_kind is not None

    def why_not_constant(self) -> str:
        """The options that make calls differ, as text."""
        differ = {
            "schedule": self.steps.constant is None,
            "recovery": self.prunes and RECOVERIES[self.recovery].remembers,
            "staleness": self.prunes and self.staleness is not None,
            "rank_every": self.rank_every > 1,
            "warm_start": self.starts_warm,
        }
        return ", ".join(f"{name}={getattr(self, name)!r}" for name, does in differ.items() if does)

    def ratio_at(self, level: int) -> float:
        """The fraction of the tokens dropped at ``level``; a mapping drops none at a level that it does not name."""
        return self.ratio.get(level, 0.0) if isinstance(self.ratio, Mapping) else self.ratio

    def to_dict(self) -> dict[str, Any]:
        """The options as values that JSON can hold, for :meth:`from_dict`.

        Raises:
            TypeError: ``ranking`` is a function, or ``schedule`` is user-defined: JSON cannot hold them.
        """
        if callable(self.ranking):
            raise TypeError(
                f"ranking is {self.ranking!r}; expected {', '.join(map(repr, RANKINGS))} or None to write as JSON"
            )
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        if isinstance(self.ratio, Mapping):
            values["ratio"] = {str(level): ratio for level, ratio in self.ratio.items()}
        values["levels"] = None if self.levels is None else list(self.levels)
        values["schedule"] = schedule_to_json(self.schedule)
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Options:
        """Options from what :meth:`to_dict` gave, or from a part of it; missing options get their defaults.

        Raises:
            TypeError, ValueError: a name is unknown, or a value is invalid.
        """
        if not isinstance(values, Mapping):
            raise TypeError(f"options are a {type(values).__name__}; expected a mapping from name to value")
        check_names(values)
        values = dict(values)
        if isinstance(values.get("ratio"), Mapping):
            values["ratio"] = {_level(name): ratio for name, ratio in values["ratio"].items()}
        if "schedule" in values:
            values["schedule"] = schedule_from_json(values["schedule"])
        return cls(**values)

    def save(self, path: str | Path) -> None:
        """Write JSON to ``path``, whole or not at all.

        Raises:
            TypeError: see :meth:`to_dict`. OSError: the file cannot be written.
        """
        text = json.dumps(self.to_dict(), indent=1) + "\n"
        with whole_file(Path(path)) as partial:
            partial.write_text(text, encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Options:
        """Read what :meth:`save` wrote.

        Raises:
            OSError: the file cannot be read. ValueError: it holds no options; the message names it.
        """
        try:
            return cls.from_dict(json.loads(Path(path).read_text(encoding="utf-8-sig")))
        except (ValueError, TypeError, RecursionError) as error:
            raise ValueError(f"{path} holds no options of atedm.apply: {error}") from error


def _check(options: Options) -> None:
    """Raise TypeError or ValueError if a value is invalid; the message begins with its name."""
    if isinstance(options.ratio, Mapping):
        for level, ratio in options.ratio.items():
            if isinstance(level, bool) or not isinstance(level, int):
                raise TypeError(f"ratio names level {level!r}; expected a level number, such as 3")
            _check_ratio(f"ratio[{level}]", ratio)
    else:
        _check_ratio("ratio", options.ratio)
    if options.levels is not None:
        is_list = isinstance(options.levels, tuple)
        if not is_list or not all(isinstance(n, int) and not isinstance(n, bool) for n in options.levels):
            raise TypeError(f"levels is {options.levels!r}; expected level numbers, such as (3,)")
    _one_of("placement", options.placement, PLACEMENTS)
    if not callable(options.ranking):
        _one_of("ranking", options.ranking, (*RANKINGS, None))
    _one_of("recovery", options.recovery, RECOVERIES)
    _one_of("staleness", options.staleness, (*STALENESS, None))
    _check_together(options)
    grid, tolerance = options.grid, options.tolerance
    if grid is not None and (isinstance(grid, bool) or not isinstance(grid, int) or not 2 <= grid <= MAX_COUNT):
        raise ValueError(f"grid is {grid!r}; expected None or an integer of at least 2, at most {MAX_COUNT}")
    _one_of("reduction", options.reduction, REDUCTIONS)
    if not isinstance(options.warm_start, bool):
        raise TypeError(f"warm_start is {options.warm_start!r}; expected True or False")
    for name in ("keep_multiple", "max_iterations", "rank_every"):
        value = getattr(options, name)
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MAX_COUNT:
            raise ValueError(f"{name} is {value!r}; expected an integer, 1 to {MAX_COUNT}")
    if isinstance(tolerance, bool) or not isinstance(tolerance, (int, float)):
        raise TypeError(f"tolerance is {tolerance!r}; expected a number of at least 0")
    if not 0 <= tolerance <= MAX_FLOAT32:
        raise ValueError(f"tolerance is {tolerance!r}; expected a finite number of at least 0 that float32 holds")


def _check_together(options: Options) -> None:
    if options.ranking is None and options.staleness is None:
        raise ValueError("ranking is None and staleness is None; expected one of them to choose tokens by")
    if options.ranking is None and RECOVERIES[options.recovery].reads_attention:
        raise ValueError(
            f"recovery is {options.recovery!r} with ranking=None, where no query of a dropped token is computed; "
            f"expected {', '.join(repr(name) for name, each in RECOVERIES.items() if not each.reads_attention)}"
        )
    remembers = RECOVERIES[options.recovery].remembers
    for name, needs_early in (("ranking", options.ranking is None), ("recovery", remembers)):
        if needs_early and not PLACEMENTS[options.placement].is_early:
            raise ValueError(
                f"placement is {options.placement!r} with {name}={getattr(options, name)!r}; expected 'early', or the "
                "published ranking='self' and recovery='similarity'"
            )


def _level(name: object) -> int:
    if isinstance(name, int):
        return name
    if isinstance(name, str) and name.isdecimal() and str(int(name)) == name:  # "03" would be a second 3
        return int(name)
    raise ValueError(f"ratio names level {name!r}; expected a level number")


def check_names(options: Mapping[str, Any]) -> None:
    """Raise TypeError if ``options`` has a name that :class:`Options` lacks."""
    known = [f.name for f in fields(Options)]
    unknown = sorted(set(options) - set(known), key=str)
    if unknown:
        raise TypeError(f"{unknown[0]!r} is not an option; expected some of {', '.join(known)}")


# The published method (sections 3 and 4), independent of the defaults. It is placed early, which lowers FLOPs and
# changes no choice of tokens.
PUBLISHED = Options(
    schedule=DSAP(), placement="early", ranking="self", recovery="similarity", staleness=None, warm_start=False
)

# ``paper`` and ``paper-dagger`` are AT-EDM and AT-EDM† at the paper's main budget. The last two prune no tokens: on the
# embedded model, reusing whole features keeps a picture at fewer FLOPs than pruning does.
PRESETS: Mapping[str, Options] = MappingProxyType(
    {
        "default": Options(),
        "paper": replace(PUBLISHED, placement="paper"),
        "paper-dagger": replace(PUBLISHED, placement="paper", levels=(3,)),
        "quality": Options(schedule=Adaptive(0.28)),
        "fast": Options(schedule=Adaptive(0.55, min_gap=2)),
    }
)


def resolve(base: Options | str | None, changes: Mapping[str, Any]) -> Options:
    """Apply ``changes`` to ``base``: options, the name of a preset in :data:`PRESETS`, or None for the defaults.

    Raises:
        TypeError, ValueError: a preset or an option is unknown, or a value is invalid.
    """
    check_names(changes)
    if base is None:
        return Options(**changes)
    if isinstance(base, str):
        if base not in PRESETS:
            raise ValueError(f"options is {base!r}; expected an atedm.Options or a preset: {', '.join(PRESETS)}")
        base = PRESETS[base]
    if not isinstance(base, Options):
        raise TypeError(f"options is a {type(base).__name__}; expected an atedm.Options or the name of a preset")
    return replace(base, **changes)
