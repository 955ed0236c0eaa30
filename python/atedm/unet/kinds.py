"""Ask a schedule for the kind of each step of a picture, and check the answer."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

from atedm.policy.schedule import Progress, Schedule
from atedm.unet.memory import Picture
from atedm.unet.steps import Step


class Kinds:
    """Asks ``schedule`` for kinds. ``say_once`` logs a message once; it takes a key, the message and its arguments."""

    def __init__(self, schedule: Schedule, say_once: Callable[..., None]) -> None:
        self._schedule = schedule
        self._say_once = say_once

    def of(self, picture: Picture, step: Step) -> str:
        """The kind of ``step`` of ``picture``."""
        rate = partial(self._rate, picture, step.index)
        return self._ask(Progress(step.index, step.total, picture.kinds, rate, picture.rates))

    def of_one(self, step: Step) -> str:
        """The kind of a step whose picture is not known."""
        if self._schedule.constant is not None:
            return self._schedule.constant
        if step.index is not None:
            return self._ask(Progress(step.index, step.total, {}, lambda: None))
        value = step.value()
        if value is None:
            raise ValueError(f"timestep has no value (a meta tensor?); expected one with schedule={self._schedule!r}")
        return self._checked(self._schedule.kind_at(value), f"timestep {value:g}")

    def _ask(self, progress: Progress) -> str:
        return self._checked(self._schedule.kind(progress), f"step {progress.step}")

    def _checked(self, kind: str, step: str) -> str:
        if kind not in self._schedule.kinds:
            expected = ", ".join(map(repr, sorted(self._schedule.kinds)))
            raise ValueError(
                f"schedule={self._schedule!r} names {step} {kind!r}; expected one of its kinds: {expected}"
            )
        return kind

    def _rate(self, picture: Picture, step: int) -> float | None:
        """The rate of change that a schedule asks for. If it is not finite, log a warning once."""
        rate = picture.rate()
        if rate is not None and not math.isfinite(rate):
            # Reused and whole steps rank nothing, so nothing else reports a NaN.
            self._say_once(
                "rate",
                "%r: before step %d the features of the batch change by %s; expected finite numbers: look at the "
                "latents and the prompts, and at the dtype",
                self._schedule,
                step,
                rate,
            )
        return rate

    def look_back(self, picture: Picture, total: int) -> None:
        """Log once if all steps of a finished picture were whole although the schedule has other kinds.

        ``total``: number of steps of the scheduler.
        """
        has_run = len(picture.kinds) == total - picture.first
        if has_run and set(picture.kinds.values()) == {"whole"} != self._schedule.kinds:
            self._say_once(
                "few steps",
                "all %d steps of a picture were computed whole: %r found none to prune or reuse",
                len(picture.kinds),
                self._schedule,
            )
