"""Find the picture of a call, and room for what is remembered of it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from atedm.unet.memory import Memory, Picture, Slot
from atedm.unet.steps import Step


class Pictures:
    """The pictures that one UNet makes. Where a call's picture cannot be known, the reason is logged once.

    Attributes:
        memory: what is remembered of them.
    """

    def __init__(
        self,
        start: Callable[[Slot, Tensor, torch.dtype], None],
        say_once: Callable[..., None],
        differ: str,
        instead: str,
    ) -> None:
        """
        Args:
            start: see :class:`Planner`. differ: the options that make calls differ.
            instead: what a call does if nothing can be remembered.
        """
        self.memory = Memory()
        self._unknown = Picture()  # for all calls whose picture is not known
        self._start = start
        self._say_once = say_once
        self._differ, self._instead = differ, instead

    def of(self, step: Step) -> Picture | None:
        """The picture of a call. If it cannot be known, return None and log the reason once."""
        if step.picture is None:
            self._say_once(
                "picture",
                "%s: the timestep is not taken from the timesteps of a scheduler, or a run has only one, so atedm "
                "cannot tell which picture a call belongs to; %s",
                self._differ,
                self._instead,
            )
            return None
        picture = self.memory.picture(step.picture)
        if picture.begin(step.index, step.total):
            self._say_once(
                "skipped",
                "%s: a call skips steps, so it may belong to another picture; the memory of this run is forgotten",
                self._differ,
            )
        if picture.is_shared:
            self._say_once(
                "shared",
                "%s: several pictures or threads share these timesteps: what is remembered may belong to another; %s",
                self._differ,
                self._instead,
            )
            return None
        return picture

    def beside(self, step: Step) -> Picture:
        """The picture of a call that takes no part in it: one that records gradients."""
        return self._unknown if step.picture is None else self.memory.picture(step.picture)

    def slot(self, picture: Picture, sample: Tensor, in_graph: bool) -> Slot | None:
        """The room for what is remembered of ``picture``. If none is free, return None and log the reason once.

        ``in_graph``: whether a graph reads it, which needs fixed addresses.
        """
        key, make = _key(sample), partial(self.new_slot, sample)
        if not in_graph:
            return self.memory.slot(picture, key, make)
        slot = self.memory.slot_of_graphs(picture, key, make)
        if slot is None:
            self._say_once(
                "turns",
                "%s: pictures take turns on a compiled UNet, which remembers one of them; for the others, %s",
                self._differ,
                self._instead,
            )
        return slot

    def new_slot(self, sample: Tensor) -> Slot:
        """Room for what is remembered of a picture with such a sample."""
        slot = Slot(_key(sample))
        # Not inference tensors, so they can be written in any mode.
        with torch.inference_mode(False):
            self._start(slot, sample, _dtype_of(sample))
        return slot


def _key(sample: Tensor) -> tuple[Any, ...]:
    return tuple(sample.shape), _dtype_of(sample), sample.device


def _dtype_of(sample: Tensor) -> torch.dtype:
    """The dtype that the UNet computes in."""
    device = sample.device.type
    is_cast = device != "meta" and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if is_cast else sample.dtype
