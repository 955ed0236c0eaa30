"""Denoising-steps-aware pruning (AT-EDM, section 3.4): prune less while the layout of the image is decided."""

from __future__ import annotations

import math
import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

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


class RankingPeriod:
    """Tells in which calls tokens are chosen anew, where a choice serves ``every`` denoising steps.

    A new picture begins with one, and so does each phase: what DSAP left whole before has no choice yet.
    """

    def __init__(self, every: int) -> None:
        self.every = every
        self._last: tuple[float, bool] | None = None
        self._age = 0
        self._timesteps: weakref.ref[Tensor] | None = None
        self._calls = 0
        self._serves_several = False

    def __getstate__(self) -> dict[str, Any]:
        return vars(RankingPeriod(self.every))  # a copy has made no picture yet

    def is_due(self, place: float, light: bool, timesteps: Tensor | None = None, calls: int = 1) -> bool:
        """Whether the call at ``place`` chooses anew.

        Args:
            place: grows with the steps: their number, or without ``timesteps`` a value.
            timesteps: those of the picture; every run of a pipeline makes a tensor of its own.
            calls: how many calls a step takes: 2 with a second-order scheduler, which are told the same. Where there
                are more, a UNet call is no step of one picture (tiles, or halves of guidance one by one), and none
                gets what was chosen for another.
        """
        if self._last is None or (None if self._timesteps is None else self._timesteps()) is not timesteps:
            self._timesteps = None if timesteps is None else weakref.ref(timesteps)
            self._last, self._age, self._calls, self._serves_several = (place, light), 0, 1, False
            return True
        before, phase = self._last
        if (place, light) == self._last:
            self._calls += 1
            self._serves_several |= self._calls > calls
        else:
            follows = (place > before if timesteps is None else place == before + 1) and light == phase
            self._age = self._age + 1 if follows else 0
            self._calls = 1
        self._last = (place, light)
        return self._serves_several or self._age % self.every == 0


def order_of(scheduler: object) -> int:
    """How many UNet calls ``scheduler`` makes a step."""
    return max(1, int(getattr(scheduler, "order", 1)))


def denoising_step(scheduler: object | None, timestep: Tensor | float | int) -> tuple[int, int] | None:
    """Which denoising step a UNet call belongs to, of how many: ``(step, total)``; None where it cannot be told.

    Pipelines hand the UNet an element of ``scheduler.timesteps``, so its place in that tensor's storage is the
    step's number: exact for image-to-image (which starts late in the same tensor), for schedulers that call the
    model twice a step (whose timesteps repeat), and without reading a value from a GPU. Only for a timestep that is
    no such element are values compared.
    """
    timesteps = getattr(scheduler, "timesteps", None)
    if not isinstance(timesteps, Tensor) or timesteps.ndim != 1 or timesteps.numel() == 0:
        return None
    position = _position_in_storage(timesteps, timestep)
    if position is None:
        position = _position_by_value(scheduler, timesteps, timestep)
    if position is None:
        return None
    # A second-order scheduler lists 2n − 1 timesteps for n steps.
    order = order_of(scheduler)
    return position // order, -(-timesteps.numel() // order)


def _position_in_storage(timesteps: Tensor, timestep: Tensor | float | int) -> int | None:
    if not isinstance(timestep, Tensor) or timestep.dtype != timesteps.dtype or timestep.device != timesteps.device:
        return None
    if timestep.device.type == "meta" or timesteps.numel() < 2:
        return None
    is_one_element = timestep.numel() == 1 or all(s == 0 for s in timestep.stride())
    if not is_one_element or timestep.untyped_storage().data_ptr() != timesteps.untyped_storage().data_ptr():
        return None
    position, remainder = divmod(timestep.storage_offset() - timesteps.storage_offset(), timesteps.stride(0))
    return position if remainder == 0 and 0 <= position < timesteps.numel() else None


def _position_by_value(scheduler: object, timesteps: Tensor, timestep: Tensor | float | int) -> int | None:
    value = timestep_value(timestep)
    if value is None:
        return None
    index = getattr(scheduler, "step_index", None)
    if isinstance(index, int) and 0 <= index < timesteps.numel() and math.isclose(float(timesteps[index]), value):
        return index
    matches = torch.isclose(timesteps.double(), torch.tensor(value, dtype=torch.float64)).nonzero()
    return int(matches[0]) if matches.numel() else None


def timestep_value(timestep: Tensor | float | int) -> float | None:
    """The timestep as a number (the largest of several); None for a meta tensor. Synchronises with a GPU."""
    if isinstance(timestep, Tensor):
        return None if timestep.device.type == "meta" else float(timestep.max())
    return float(timestep)
