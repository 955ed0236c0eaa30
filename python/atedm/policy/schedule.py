"""Denoising-steps-aware pruning (AT-EDM, section 3.4): prune less while the layout of the image is decided."""

from __future__ import annotations

import math
from dataclasses import dataclass

# Timesteps that a diffusion model is trained with; used where no scheduler is at hand to count steps.
TRAIN_TIMESTEPS = 1000


@dataclass(frozen=True)
class DSAP:
    """Prune lightly during the first ``fraction`` of the denoising steps, everywhere after that.

    In the light phase the first attention block of each down stage and the last one of each up stage stay whole.
    Of ``n`` steps the first ``ceil(fraction · n)`` are light: 15 of 50 at the paper's 0.3.

    Args:
        fraction: 0 (always prune everywhere) to 1 (always light).

    Raises:
        ValueError: ``fraction`` outside 0 to 1. TypeError: no number.
    """

    fraction: float = 0.3

    def __post_init__(self) -> None:
        if isinstance(self.fraction, bool) or not isinstance(self.fraction, (int, float)):
            raise TypeError(f"fraction is {self.fraction!r}; expected a number from 0 to 1")
        if not 0 <= self.fraction <= 1:
            raise ValueError(f"fraction is {self.fraction}; expected 0 to 1, the part of the steps pruned lightly")

    @property
    def constant_phase(self) -> bool | None:
        """Whether every step is light (True) or none is (False); None where it depends on the step."""
        return {0: False, 1: True}.get(self.fraction)

    def light_steps(self, total: int) -> int:
        """How many of ``total`` steps are light. The small term absorbs the rounding of, say, 0.1 · 30."""
        return math.ceil(self.fraction * total - 1e-9)

    def is_light(self, step: int, total: int) -> bool:
        """Whether denoising step ``step`` (from 0) of ``total`` is light."""
        return step < self.light_steps(total)

    def is_light_at(self, timestep: float) -> bool:
        """The same by the timestep's value, from ``TRAIN_TIMESTEPS`` (noise) down to 0, without a scheduler.

        Exact for evenly spaced timesteps up to the scheduler's offset (a step more or less); schedules that space
        them by noise level (Karras, exponential) can be several steps off.
        """
        return 1.0 - timestep / TRAIN_TIMESTEPS < self.fraction
