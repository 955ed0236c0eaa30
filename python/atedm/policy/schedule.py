"""The kind of each denoising step: DSAP (AT-EDM, section 3.4), and schedules that reuse deep features (ours).

Features change fast in the first steps and slowly later, so a step can cost less when little changes:

- ``whole``: every block computes every token.
- ``light``: DSAP's first phase. The first attention block of each down stage and the last of each up stage are whole.
- ``pruned``: every chosen block drops tokens.
- ``reused``: no block below the highest resolution runs. The last layer of the last up block gets the same input as in
  the last computed step, whatever the kind of that step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from atedm_kernels.registry import plain_number

KINDS = ("whole", "light", "pruned", "reused")

# The kinds that drop tokens.
PRUNING = frozenset({"light", "pruned"})

# Fraction of a run that counts as early. With Karras' steps features change most late in the run; alternating computed
# and reused steps there ruins pictures.
EARLY = 0.3

# Number of steps of a long run. In shorter runs features change a lot from one step to the next.
LONG_RUN = 12

# The last two computed steps of an adaptive schedule may be farther apart than others, by ``1 / STRETCH`` of a gap.
STRETCH = 4

# A feature that changes by less than this, and by less than this part of the tolerance, stands still: it may be reused
# this many times as long as others.
STILL, STILL_PART, STILL_GAPS = 0.07, 1 / 12, 3

# Part of the tolerance that is used while the rate of change grows: the next rates can be higher than expected, and a
# single reused step changes pictures most there. In a run of ``n`` times as many steps as ``TUNED_STEPS``, where a rate
# grows less from step to step, its ``n``-th root.
GROWING = 0.5

# Number of steps of the runs that tolerances are chosen on. Twice as many steps halve the change per step: with the
# same tolerance all additional steps would be reused, and the picture would come no closer to the full one. The lab
# chose the power at 50 steps.
TUNED_STEPS, TUNED_POWER = 25, 0.75

# Number of timesteps that a diffusion model is trained with; used if no scheduler is available to count steps.
TRAIN_TIMESTEPS = 1000


def computed_steps(kinds: Mapping[int, str]) -> list[int]:
    """The steps that are computed, in order. ``kinds``: the kind of each step, by step."""
    return [step for step, kind in kinds.items() if kind != "reused"]


@dataclass(frozen=True)
class Progress:
    """The progress of a picture when the kind of its next step is chosen.

    Attributes:
        step: the denoising step, from 0, of ``total``.
        kinds: the kind of each step that this picture has run, by step.
        rate: change per step, between the last two computed steps, of the feature that ``reused`` steps take, relative
            to its norm; None until two steps have been computed, NaN or infinite if the feature is not finite. Reading
            it may synchronise with a GPU.
        rates: what ``rate`` has returned so far, by the computed step at which the change was measured.
    """

    step: int
    total: int
    kinds: Mapping[int, str]
    rate: Callable[[], float | None]
    rates: Mapping[int, float] = field(default_factory=dict)

    @property
    def computed(self) -> list[int]:
        """The steps that have been computed, in order."""
        return computed_steps(self.kinds)


class Schedule:
    """Chooses the kind of each step. Override :meth:`kind`; the properties say what is known in advance."""

    @property
    def kinds(self) -> frozenset[str]:
        """All kinds that the schedule may choose."""
        return frozenset(KINDS)

    @property
    def constant(self) -> str | None:
        """The kind of every step, if all steps have the same kind; else None."""
        return None

    @property
    def reads_past(self) -> bool:
        """Whether a kind may depend on what the picture has run, and not only on the step."""
        return self.constant is None

    def kind(self, progress: Progress) -> str:
        """The kind of the step ``progress.step``, one of :attr:`kinds`."""
        raise NotImplementedError

    def kind_at(self, timestep: float) -> str:
        """The kind judged only by the timestep's value, from ``TRAIN_TIMESTEPS`` (noise) down to 0.

        For evenly spaced timesteps it is exact up to one step. With schedulers that space them by noise level (Karras,
        exponential) it can be several steps off.
        """
        step = min(max(math.floor(TRAIN_TIMESTEPS - timestep), 0), TRAIN_TIMESTEPS - 1)
        return self.kind(Progress(step, TRAIN_TIMESTEPS, {}, lambda: None))

    def planned(self, total: int) -> list[str] | None:
        """The kinds of a run of ``total`` steps; None if they depend on what the run computes."""
        kinds: dict[int, str] = {}

        def rate() -> None:
            raise _DependsOnRun

        try:
            for step in range(total):
                kinds[step] = self.kind(Progress(step, total, kinds, rate))
        except _DependsOnRun:
            return None
        return list(kinds.values())


class _ByStep(Schedule):
    """A schedule whose kinds depend only on the step."""

    @property
    def reads_past(self) -> bool:
        return False


class _DependsOnRun(Exception):
    """Raised when a schedule asks for the rate of change."""


def _with_plain_numbers(schedule: Any) -> None:
    for each in fields(schedule):
        object.__setattr__(schedule, each.name, plain_number(getattr(schedule, each.name)))


def _check_number(name: str, value: object, lowest: float, highest: float, meaning: str) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} is {value!r}; expected a number from {lowest:g} to {highest:g}")
    if not lowest <= value <= highest:
        raise ValueError(f"{name} is {value}; expected {lowest:g} to {highest:g}, {meaning}")


def _check_count(name: str, value: object, lowest: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < lowest:
        raise ValueError(f"{name} is {value!r}; expected an integer of at least {lowest}")


def _check_kind(name: str, kind: object, allowed: Sequence[str] = KINDS) -> None:
    if kind not in allowed:
        raise ValueError(f"{name} is {kind!r}; expected one of {', '.join(map(repr, allowed))}")


@dataclass(frozen=True)
class DSAP(_ByStep):
    """Prune lightly during the first ``fraction`` of the denoising steps, and everywhere after that.

    Of ``n`` steps the first ``ceil(fraction · n)`` are light: 15 of 50 at the paper's 0.3.

    Args:
        fraction: 0 (always prune everywhere) to 1 (always light).

    Raises:
        ValueError: ``fraction`` is outside 0 to 1. TypeError: it is not a number.
    """

    fraction: float = 0.3

    def __post_init__(self) -> None:
        _with_plain_numbers(self)
        _check_number("fraction", self.fraction, 0, 1, "the part of the steps pruned lightly")

    @property
    def kinds(self) -> frozenset[str]:
        return PRUNING if self.constant is None else frozenset({self.constant})

    @property
    def constant(self) -> str | None:
        return {0: "pruned", 1: "light"}.get(self.fraction)

    def light_steps(self, total: int) -> int:
        """Number of light steps among ``total``. The small term absorbs the rounding of, for example, 0.1 · 30."""
        return math.ceil(self.fraction * total - 1e-9)

    def kind(self, progress: Progress) -> str:
        return "light" if progress.step < self.light_steps(progress.total) else "pruned"


@dataclass(frozen=True)
class Every(_ByStep):
    """Compute every ``n``-th step, starting with the first; the steps in between reuse its features.

    With ``computed="whole"`` this is what DeepCache (Ma et al., CVPR 2024) does at interval ``n``.

    Args:
        n: at least 1. computed: the kind of the steps that are not reused, ``"whole"``, ``"light"`` or ``"pruned"``.

    Raises:
        ValueError: an argument is invalid.
    """

    n: int = 2
    computed: str = "whole"

    def __post_init__(self) -> None:
        _with_plain_numbers(self)
        _check_count("n", self.n, 1)
        _check_kind("computed", self.computed, KINDS[:3])

    @property
    def kinds(self) -> frozenset[str]:
        return frozenset({self.computed} if self.n == 1 else {self.computed, "reused"})

    @property
    def constant(self) -> str | None:
        return self.computed if self.n == 1 else None

    def kind(self, progress: Progress) -> str:
        return self.computed if progress.step % self.n == 0 else "reused"


@dataclass(frozen=True)
class Listed(_ByStep):
    """One kind for each step. A run with another number of steps uses them at the same fractions of the run.

    Args:
        steps: names from ``KINDS``, at least one.

    Raises:
        ValueError: the list is empty, or holds an unknown kind.
    """

    steps: tuple[str, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "steps", tuple(self.steps))
        if not self.steps:
            raise ValueError("schedule is empty; expected one kind for each step")
        for number, kind in enumerate(self.steps):
            _check_kind(f"schedule[{number}]", kind)

    @property
    def kinds(self) -> frozenset[str]:
        return frozenset(self.steps)

    @property
    def constant(self) -> str | None:
        kind = self.steps[0]
        return kind if len(self.kinds) == 1 and kind != "reused" else None

    def kind(self, progress: Progress) -> str:
        return self.steps[progress.step * len(self.steps) // progress.total]


@dataclass(frozen=True)
class Adaptive(Schedule):
    """Reuse features until they have changed by ``tolerance`` since the last computed step; then compute one (ours).

    Between two computed steps the feature changes at some rate per step. At that rate it takes ``tolerance / rate``
    steps, rounded down, to change by ``tolerance``; the next computed step is about that far away. A rate that has
    grown is expected to go on growing by the same factor per step, as it does under Karras' timesteps, and only half
    the tolerance is used then. This adapts to any scheduler, while a fixed list that suits one scheduler ruins pictures
    under another. The last step is computed, because multistep solvers end on the UNet's output there. To make room for
    it, the rest of the run is divided into equal parts. The run is the scheduler's timesteps: image-to-image starts
    late in them, and ``denoising_end`` stops before the last one, which no call can know. If features are not finite,
    the next step is computed: there is nothing to reuse, and a pruned step reports the NaN.

    Args:
        tolerance: the relative change of the feature, above 0. A higher tolerance reuses more. A run of more than
            ``TUNED_STEPS`` (25) steps multiplies it by ``(25 / steps) ** 0.75``, so that more steps also come closer to
            the full picture, and uses more than half of it while rates grow: ``0.5 ** (25 / steps)``.
        max_gap: the largest distance between two computed steps; the last two may be a quarter farther apart. It is
            three times as large where features are expected to change by less than 0.07 and than a twelfth of the
            tolerance.
        min_gap: the smallest distance in the first 30 % of the run. The first two computed steps are that far apart,
            because no rate is known yet. Later, and in a run of fewer than ``12 · min_gap`` steps, it is 1.
        pruned_from: the fraction of the run from which computed steps may be pruned; 1 prunes none. A run of fewer than
            12 steps is not pruned, nor is a step in which the feature is expected to change by more than ``tolerance``
            (with a ``max_gap`` of 1 nothing is expected).
        whole_every: from there on, every ``whole_every``-th computed step is whole, and those in between are pruned.

    Raises:
        ValueError, TypeError: an argument is invalid.
    """

    tolerance: float = 0.3
    max_gap: int = 4
    pruned_from: float = 1.0
    whole_every: int = 2
    min_gap: int = 1

    def __post_init__(self) -> None:
        _with_plain_numbers(self)
        _check_number("tolerance", self.tolerance, 0, math.inf, "the relative change of the feature")
        if not 0 < self.tolerance < math.inf:
            raise ValueError(f"tolerance is {self.tolerance}; expected a finite number above 0")
        _check_count("max_gap", self.max_gap, 1)
        _check_count("min_gap", self.min_gap, 1)
        if self.min_gap > self.max_gap:
            raise ValueError(f"min_gap is {self.min_gap}; expected at most max_gap, {self.max_gap}")
        _check_number("pruned_from", self.pruned_from, 0, 1, "a fraction of the run")
        _check_count("whole_every", self.whole_every, 1)

    @property
    def kinds(self) -> frozenset[str]:
        prunes, reuses = self.pruned_from < 1 and self.whole_every > 1, self.max_gap > 1
        return frozenset({"whole"} | ({"pruned"} if prunes else set()) | ({"reused"} if reuses else set()))

    @property
    def constant(self) -> str | None:
        return "whole" if self.kinds == {"whole"} else None

    def kind(self, progress: Progress) -> str:
        computed = progress.computed
        if len(computed) < 2:
            return "whole" if not computed or progress.step >= computed[0] + self._least(progress) else "reused"
        if progress.step < computed[-1] + self._distance(progress, progress.total - 1 - computed[-1]):
            return "reused"
        if progress.step < self.pruned_from * progress.total or progress.total < LONG_RUN:
            return "whole"
        # Where nothing is reused, no rate is measured.
        if self.max_gap > 1 and self._tolerance(progress) < _expectation(progress)(1) < math.inf:
            return "whole"  # the updates of dropped tokens would be out of date
        since_whole = 1
        for step in reversed(computed):
            if progress.kinds[step] == "whole":
                break
            since_whole += 1
        return "whole" if since_whole >= self.whole_every else "pruned"

    def _distance(self, progress: Progress, left: int) -> int:
        """Number of steps from the last computed step to the next one, if ``left`` steps are left."""
        gap = self._gap(progress)
        parts = -(-(left - gap // STRETCH) // gap)
        return left if parts <= 1 else min(gap, -(-left // parts))

    def _least(self, progress: Progress) -> int:
        is_early = progress.step < EARLY * progress.total and progress.total >= LONG_RUN * self.min_gap
        return self.min_gap if is_early else 1

    def _gap(self, progress: Progress) -> int:
        """Number of steps in which the feature changes by ``tolerance``, within the bounds of a gap."""
        if self.max_gap == 1:
            return 1
        rate = progress.rate()
        if rate is None:
            return self.max_gap
        if not math.isfinite(rate):
            return 1  # whatever min_gap is: there is nothing to reuse
        gap, tolerance = self._least(progress), self._tolerance(progress)
        change_in = _expectation(progress)
        still = min(STILL, STILL_PART * tolerance)
        for most, change in ((self.max_gap, tolerance), (STILL_GAPS * self.max_gap, still)):
            while gap < min(most, progress.total) and change_in(gap + 1) <= change:
                gap += 1
        return gap

    def _tolerance(self, progress: Progress) -> float:
        return self.tolerance * _step_length(progress) ** TUNED_POWER


def _step_length(progress: Progress) -> float:
    """The length of a step, in steps of the runs that tolerances are chosen on; 1 for longer steps."""
    return min(1.0, TUNED_STEPS / progress.total)


def _expectation(progress: Progress) -> Callable[[int], float]:
    """How much the feature may change in a number of steps: at the rate in their middle, if it goes on growing."""
    before, last = progress.computed[-2:]
    rate, growth = progress.rate() or 0.0, _growth(progress)
    if growth > 1:
        rate /= GROWING ** _step_length(progress)
    return lambda gap: gap * rate * growth ** min((last - before + gap) / 2, 1000)


def _growth(progress: Progress) -> float:
    """The factor by which the rate of change has grown per step, at least 1; 1 until two rates are known."""
    computed = progress.computed
    before, now = (progress.rates.get(step) for step in computed[-2:])
    if len(computed) < 3 or not before or not now or not math.isfinite(before):
        return 1.0
    # No gap survives a factor of 2; powers of more would overflow.
    return min(max(1.0, (now / before) ** (2 / (computed[-1] - computed[-3]))), 2.0)


SCHEDULES: dict[str, type[Schedule]] = {"DSAP": DSAP, "Every": Every, "Adaptive": Adaptive}


def as_schedule(value: object) -> Schedule | None:
    """Convert what :func:`atedm.apply` takes: a schedule, None to prune at every step, or a list of kinds.

    Raises:
        TypeError, ValueError: ``value`` is something else.
    """
    if isinstance(value, (list, tuple)):
        return Listed(tuple(value))
    if value is None or isinstance(value, Schedule):
        return value
    raise TypeError(
        f"schedule is {value!r}; expected an atedm.DSAP, atedm.Every or atedm.Adaptive, a list of kinds, or None to "
        "prune at every step"
    )


def schedule_to_json(schedule: Schedule | None) -> Any:
    """A schedule as JSON: None, a list of kinds, or a mapping with the schedule's name and arguments.

    Raises:
        TypeError: a user-defined schedule, which cannot be written as JSON.
    """
    if schedule is None or isinstance(schedule, Listed):
        return None if schedule is None else list(schedule.steps)
    if type(schedule) not in SCHEDULES.values():
        raise TypeError(f"schedule is {schedule!r}; expected one of {', '.join(SCHEDULES)} or a list to write as JSON")
    return {"name": type(schedule).__name__, **asdict(schedule)}


def schedule_from_json(value: Any) -> Any:
    """Read what :func:`schedule_to_json` wrote. A mapping without a name is read as a :class:`DSAP`."""
    if not isinstance(value, Mapping):
        return value
    arguments = dict(value)
    name = arguments.pop("name", "DSAP")
    if name not in SCHEDULES:
        raise ValueError(f"schedule is named {name!r}; expected one of {', '.join(SCHEDULES)}")
    known = [f.name for f in fields(SCHEDULES[name])]
    if not set(arguments) <= set(known):
        raise ValueError(f"schedule is {value!r}; expected {', '.join(known)} of {name}")
    return SCHEDULES[name](**arguments)
