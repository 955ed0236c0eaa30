"""The kind of each denoising step, and the schedules that know it in advance: DSAP (AT-EDM, section 3.4) and others.

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
from dataclasses import dataclass, field, fields
from typing import Any

from atedm_kernels.registry import plain_number

KINDS = ("whole", "light", "pruned", "reused")

# The kinds that drop tokens.
PRUNING = frozenset({"light", "pruned"})

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


def with_plain_numbers(schedule: Any) -> None:
    for each in fields(schedule):
        object.__setattr__(schedule, each.name, plain_number(getattr(schedule, each.name)))


def check_number(name: str, value: object, lowest: float, highest: float, meaning: str) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} is {value!r}; expected a number from {lowest:g} to {highest:g}")
    if not lowest <= value <= highest:
        raise ValueError(f"{name} is {value}; expected {lowest:g} to {highest:g}, {meaning}")


def check_count(name: str, value: object, lowest: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < lowest:
        raise ValueError(f"{name} is {value!r}; expected an integer of at least {lowest}")


def check_kind(name: str, kind: object, allowed: Sequence[str] = KINDS) -> None:
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
        with_plain_numbers(self)
        check_number("fraction", self.fraction, 0, 1, "the part of the steps pruned lightly")

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
        with_plain_numbers(self)
        check_count("n", self.n, 1)
        check_kind("computed", self.computed, KINDS[:3])

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
            check_kind(f"schedule[{number}]", kind)

    @property
    def kinds(self) -> frozenset[str]:
        return frozenset(self.steps)

    @property
    def constant(self) -> str | None:
        kind = self.steps[0]
        return kind if len(self.kinds) == 1 and kind != "reused" else None

    def kind(self, progress: Progress) -> str:
        return self.steps[progress.step * len(self.steps) // progress.total]
