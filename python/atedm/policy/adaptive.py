"""The schedule that reuses features until they have changed by some tolerance (ours)."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass

from atedm.policy.schedule import Progress, Schedule, check_count, check_number, with_plain_numbers

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
        with_plain_numbers(self)
        check_number("tolerance", self.tolerance, 0, math.inf, "the relative change of the feature")
        if not 0 < self.tolerance <= sys.float_info.max:
            raise ValueError(f"tolerance is {self.tolerance}; expected a finite number above 0")
        check_count("max_gap", self.max_gap, 1)
        check_count("min_gap", self.min_gap, 1)
        if self.min_gap > self.max_gap:
            raise ValueError(f"min_gap is {self.min_gap}; expected at most max_gap, {self.max_gap}")
        check_number("pruned_from", self.pruned_from, 0, 1, "a fraction of the run")
        check_count("whole_every", self.whole_every, 1)

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
