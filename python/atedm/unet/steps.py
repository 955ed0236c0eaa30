"""Find out which denoising step a call of the UNet is, and of which picture, only from its timestep.

Pipelines hand the UNet an element of ``scheduler.timesteps``. That element is a view: its place in the storage is the
step, and the storage identifies the picture, because every run makes its own timesteps. This is exact for
image-to-image, which starts late in them, for ``denoising_end``, which stops early, and for schedulers that call the
model twice per step, where each call has an entry. Values are read from a GPU once per picture.
"""

from __future__ import annotations

import math
import weakref
from dataclasses import dataclass

import torch
from torch import Tensor

Timestep = Tensor | float | int

# Whether the timesteps in a storage fall, from noise to picture; by the address of the storage, while it lives.
_falls: dict[int, tuple[weakref.ref[torch.UntypedStorage], bool]] = {}


@dataclass(frozen=True)
class Step:
    """The place of a UNet call in the denoising of a picture.

    Attributes:
        index: index among the ``total`` timesteps, from 0; None if only the timestep's value is known.
        picture: the storage of the timesteps, which identifies the picture; None if unknown.
        timestep: the timestep that the UNet was called with.
    """

    timestep: Timestep | None = None
    index: int | None = None
    total: int | None = None
    picture: torch.UntypedStorage | None = None

    def value(self) -> float | None:
        """The timestep as a number (the largest of several); None for a meta tensor. Synchronises with a GPU."""
        if isinstance(self.timestep, Tensor):
            return None if self.timestep.device.type == "meta" else float(self.timestep.max())
        return None if self.timestep is None else float(self.timestep)


def step_of(timestep: Timestep | None, scheduler: object | None = None) -> Step:
    """The step of a call with ``timestep``.

    Args:
        scheduler: its ``timesteps`` are searched for the value if ``timestep`` is not a view of a schedule.
    """
    if isinstance(timestep, Tensor) and timestep.device.type != "meta":
        storage = timestep.untyped_storage()
        is_one_element = timestep.numel() == 1 or not any(timestep.stride())
        if is_one_element and _is_schedule(storage, timestep):
            return Step(timestep, timestep.storage_offset(), storage.nbytes() // timestep.element_size(), storage)
    step = Step(timestep)
    position = _position_by_value(scheduler, step)
    return step if position is None else Step(timestep, position, scheduler.timesteps.numel())


def _is_schedule(storage: torch.UntypedStorage, timestep: Tensor) -> bool:
    """Whether ``storage`` holds a scheduler's timesteps: several values, which fall and never rise.

    A copy of one timestep has a storage of one element. Other tensors that ``timestep`` may be a part of rise, or stay
    equal.
    """
    if storage.nbytes() < 2 * timestep.element_size() or timestep.dtype.is_complex:
        return False
    address = id(storage)
    known = _falls.get(address)
    if known is None or known[0]() is not storage:
        values = torch.empty(0, dtype=timestep.dtype, device=timestep.device).set_(storage)
        falls = bool((values[1:] <= values[:-1]).all() & (values[0] > values[-1]))
        known = _falls[address] = (weakref.ref(storage, lambda _: _falls.pop(address, None)), falls)
    return known[1]


def _position_by_value(scheduler: object | None, step: Step) -> int | None:
    timesteps = getattr(scheduler, "timesteps", None)
    if not isinstance(timesteps, Tensor) or timesteps.ndim != 1 or timesteps.numel() == 0:
        return None
    value = step.value()
    if value is None:
        return None
    index = getattr(scheduler, "step_index", None)
    if isinstance(index, int) and 0 <= index < timesteps.numel() and math.isclose(float(timesteps[index]), value):
        return index
    matches = torch.isclose(timesteps.cpu().double(), torch.tensor(value, dtype=torch.float64)).nonzero()
    return int(matches[0]) if matches.numel() else None
