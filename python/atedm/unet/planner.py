"""What the next call of a UNet is: its kind, its picture, what is remembered of that."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from atedm.policy.options import Options
from atedm.policy.schedule import PRUNING, Progress
from atedm.unet.memory import Memory, Picture, Slot
from atedm.unet.recording import Recording
from atedm.unet.steps import Step, step_of

if TYPE_CHECKING:
    from atedm.unet.calls import UNetCalls

logger = logging.getLogger("atedm")


@dataclass
class Call:
    """One call of the UNet.

    Attributes:
        kind: of its step, see :mod:`atedm.policy.schedule`. ranks: whether tokens are chosen in it, where it prunes.
            choice: the step of the choice that it goes by. is_warm: whether the ranking begins at the scores of an
            earlier step.
        slot: what is remembered of its picture; None where nothing is, or where that cannot be told.
        picture: the one that ``slot`` belongs to. step: denoising step of ``total``, where it is known.
        recordings: those that see it, and which of their calls it is.
        before: what ran when it began, which runs on when it has ended: a UNet may call another.
    """

    kind: str = "pruned"
    ranks: bool = True
    choice: int | None = None
    is_warm: bool = False
    slot: Slot | None = None
    picture: Picture | None = None
    step: int | None = None
    total: int | None = None
    recordings: list[tuple[Recording, int]] = field(default_factory=list)
    before: tuple[UNetCalls, Call] | None = None


class Planner:
    """Plans the calls of one UNet that was pruned by ``options``.

    Attributes:
        memory: of the pictures that are being made. differ: the options by which calls differ.
        forced: what every call is meanwhile, in :meth:`all_of_kind`.
    """

    def __init__(
        self, options: Options, start: Callable[[Slot, Tensor, torch.dtype], None], scheduler: object | None
    ) -> None:
        """``start`` makes room in a slot for what the UNet's parts remember of a picture with such a sample."""
        self.options = options
        self.scheduler = scheduler
        self.memory = Memory()
        self._start = start
        self._said: set[str] = set()
        self.differ = options.why_not_constant()
        self._follows_pictures, self._starts_warm = options.follows_pictures, options.starts_warm
        # What a call does of which nothing can be remembered.
        if options.remembers:
            self._instead = "every step is whole"
        elif options.rank_every > 1:
            self._instead = "tokens are chosen in every call"
        else:
            self._instead = "every ranking begins at uniform scores"
        self.forced: Call | None = None

    def say_once(self, what: str, message: str, *args: Any) -> None:
        if what not in self._said:
            self._said.add(what)
            logger.warning(message, *args)

    @contextlib.contextmanager
    def all_of_kind(self, kind: str, sample: Tensor) -> Iterator[None]:
        """Make every call one of ``kind`` that follows others with ``sample``: to count FLOPs, and to time."""
        needs_slot = self._follows_pictures or kind == "reused"
        slot = self._make_slot(_key(sample), sample) if needs_slot else None
        self.forced = Call(kind, is_warm=self._starts_warm and kind in PRUNING, slot=slot)
        try:
            yield
        finally:
            self.forced = None

    def call(self, args: tuple[Any, ...], kwargs: dict[str, Any], *, in_graph: bool) -> Call:
        """The call with these arguments, which begins.

        Args:
            in_graph: whether a graph runs it, or what of it has memory: that reads fixed addresses.
        """
        options = self.options
        sample = args[0] if args else kwargs["sample"]
        if self.forced is not None:
            return replace(self.forced)
        step = step_of(args[1] if len(args) > 1 else kwargs.get("timestep"), self.scheduler)
        picture = self._picture(step) if self._follows_pictures else None
        slot = None if picture is None else self._slot(picture, sample, in_graph)
        if slot is None:
            kind = "whole" if options.remembers else self._kind_of_one(step)
            return Call(kind=kind, step=step.index, total=step.total)
        kind = options.steps.kind(
            Progress(step.index, step.total, picture.kinds, lambda: self._rate(picture, step.index))
        )
        if options.remembers and not picture.is_filled:
            kind = "whole"
        ranks = kind in PRUNING and picture.is_choice_due(step.index, kind, options.rank_every)
        is_warm = self._starts_warm and ranks and picture.has_ranks_for(kind)
        choice = step.index if ranks else picture.chosen
        return Call(kind, ranks, choice, is_warm, slot, picture, step.index, step.total)

    def _rate(self, picture: Picture, step: int) -> float | None:
        """The rate of change that a schedule asks for; a warning, once, where it is no finite number."""
        rate = picture.rate()
        if rate is not None and not math.isfinite(rate):
            # Reused and whole steps rank nothing, so that nothing else would name a NaN.
            self.say_once(
                "rate",
                "%r: before step %d the features of the batch change by %s; expected finite numbers: look at the "
                "latents and the prompts, and at the dtype",
                self.options.steps,
                step,
                rate,
            )
        return rate

    def _picture(self, step: Step) -> Picture | None:
        """The picture of a call; None, said once, where it cannot be told."""
        if step.picture is None:
            self.say_once(
                "picture",
                "%s: the timestep is no element of a scheduler's timesteps, of which there are several in a run, so a "
                "call may belong to any picture; %s",
                self.differ,
                self._instead,
            )
            return None
        picture = self.memory.picture(step.picture)
        picture.begin(step.index, step.total)
        if picture.is_shared:
            self.say_once(
                "shared",
                "%s: several contents have the same timesteps, so what is remembered may be another's; %s",
                self.differ,
                self._instead,
            )
            return None
        return picture

    def _slot(self, picture: Picture, sample: Tensor, in_graph: bool) -> Slot | None:
        def make(key: tuple[Any, ...]) -> Slot:
            return self._make_slot(key, sample)

        if not in_graph:
            return self.memory.slot(picture, _key(sample), make)
        slot = self.memory.slot_of_graphs(picture, _key(sample), make)
        if slot is None:
            self.say_once(
                "turns",
                "%s: pictures take turns on a compiled UNet, which remembers one; %s of the others",
                self.differ,
                self._instead,
            )
        return slot

    def _make_slot(self, key: tuple[Any, ...], sample: Tensor) -> Slot:
        slot, device = Slot(key), sample.device
        is_cast = device.type != "meta" and torch.is_autocast_enabled(device.type)
        dtype = torch.get_autocast_dtype(device.type) if is_cast else sample.dtype
        # Ordinary tensors, which may be written in any mode.
        with torch.inference_mode(False):
            self._start(slot, sample, dtype)
        return slot

    def _kind_of_one(self, step: Step) -> str:
        """The kind of a step where nothing is remembered."""
        steps = self.options.steps
        if steps.constant is not None:
            return steps.constant
        if step.index is not None:
            return steps.kind(Progress(step.index, step.total, {}, lambda: None))
        value = step.value()
        if value is None:
            raise ValueError(f"timestep has no value (a meta tensor?); expected one with schedule={steps!r}")
        return steps.kind_at(value)

    def ended(self, call: Call) -> None:
        """Note that ``call`` has come to its end without an exception."""
        picture = call.picture
        if picture is None or call.slot is None or picture.slot is not call.slot:
            return
        picture.end(call.step, call.kind, call.ranks)
        if picture.is_over:
            if set(picture.kinds.values()) == {"whole"} != self.options.steps.kinds:
                self.say_once(
                    "few steps",
                    "all %d steps of a picture were computed whole: %r found none to prune or reuse",
                    len(picture.kinds),
                    self.options.steps,
                )
            if call.slot.owner is None:
                picture.restart()  # nothing more will be asked of it


def _key(sample: Tensor) -> tuple[Any, ...]:
    return tuple(sample.shape), sample.dtype, sample.device
