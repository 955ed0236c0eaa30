"""Plans the next call of a UNet: its kind, its picture, and what is remembered of that picture."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from atedm.policy.options import Options
from atedm.policy.schedule import PRUNING
from atedm.unet.gradients import is_in_backward, refuse_reentrant
from atedm.unet.kinds import Kinds
from atedm.unet.memory import Picture, Slot
from atedm.unet.pictures import Pictures
from atedm.unet.recording import BESIDE, Recording
from atedm.unet.steps import Step, step_of

if TYPE_CHECKING:
    from atedm.unet.calls import UNetCalls

logger = logging.getLogger("atedm")


@dataclass
class Call:
    """One call of the UNet.

    Attributes:
        kind: the kind of its step, see :mod:`atedm.policy.schedule`. ranks: whether it chooses tokens, if it prunes.
            choice: the step whose choice of tokens it uses. is_warm: whether the ranking starts from the scores of an
            earlier step.
        slot: what is remembered of its picture; None if nothing is, or if the picture is not known.
        picture: the picture that it belongs to; None if not known. step: its denoising step, of ``total``; None if not
            known. for_gradients: whether it records gradients and leaves alone what is remembered.
        recordings: the recordings that collect its tokens, each with this call's index there.
        before: the call that was running when this one began, which continues afterwards: a UNet may call another.
    """

    kind: str = "pruned"
    ranks: bool = True
    choice: int | None = None
    is_warm: bool = False
    slot: Slot | None = None
    picture: Picture | None = None
    step: int | None = None
    total: int | None = None
    for_gradients: bool = False
    recordings: list[tuple[Recording, int]] = field(default_factory=list)
    before: tuple[UNetCalls, Call] | None = None

    @property
    def run(self) -> int | None:
        """The number of the picture's run; None if the picture is not known."""
        return BESIDE if self.for_gradients else None if self.picture is None else self.picture.run

    def break_off(self) -> None:
        """Note that the call did not finish."""
        if self.picture is not None:
            self.picture.break_off()


class Planner:
    """Plans the calls of one UNet that was pruned with ``options``.

    Attributes:
        pictures: those that are being made. differ: the options that make calls differ.
        forced: the call that :meth:`all_of_kind` makes every call; None outside of it.
    """

    def __init__(
        self, options: Options, start: Callable[[Slot, Tensor, torch.dtype], None], scheduler: object | None
    ) -> None:
        """``start``: makes room in a slot for what the UNet's parts remember, for such a sample and dtype."""
        self.options = options
        self.scheduler = scheduler
        self._said: set[str] = set()
        self._kinds = Kinds(options.steps, self.say_once)
        self.differ = options.why_not_constant()
        self._follows_pictures, self._starts_warm = options.follows_pictures, options.starts_warm
        self._instead = _without_memory(options)
        self.pictures = Pictures(start, self.say_once, self.differ, self._instead)
        self.forced: Call | None = None

    def say_once(self, what: str, message: str, *args: Any) -> None:
        if what not in self._said:
            self._said.add(what)
            logger.warning(message, *args)

    @contextlib.contextmanager
    def all_of_kind(self, kind: str, sample: Tensor) -> Iterator[None]:
        """Make every call a later call of ``kind`` on ``sample``, to count its FLOPs or to time it."""
        needs_slot = self._follows_pictures or kind == "reused"
        slot = self.pictures.new_slot(sample) if needs_slot else None
        for block in slot.blocks.values() if slot is not None else ():
            block.is_filled = True
        self.forced = Call(kind, is_warm=self._starts_warm and kind in PRUNING, slot=slot)
        try:
            yield
        finally:
            self.forced = None

    def step(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Step:
        """The step of a call with these arguments."""
        return step_of(args[1] if len(args) > 1 else kwargs.get("timestep"), self.scheduler)

    def call(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], *, in_graph: bool, for_gradients: bool = False
    ) -> Call:
        """Plan the call with these arguments, which begins now.

        Args:
            in_graph: whether a graph runs it, or runs the parts that remember: a graph reads fixed addresses.
            for_gradients: whether it records what gradients need.
        """
        options = self.options
        sample = args[0] if args else kwargs["sample"]
        if self.forced is not None:
            return replace(self.forced)
        step = self.step(args, kwargs)
        if for_gradients and self._follows_pictures:
            return self._call_for_gradients(step)
        picture = self.pictures.of(step) if self._follows_pictures else None
        if picture is not None:
            try:
                call = self._call_of(picture, step, sample, in_graph)
            except BaseException:
                picture.break_off()
                raise
            if call is not None:
                return call
        kind = "whole" if options.remembers else self._kinds.of_one(step)
        return Call(kind=kind, picture=picture, step=step.index, total=step.total)

    def _call_of(self, picture: Picture, step: Step, sample: Tensor, in_graph: bool) -> Call | None:
        """The call of ``picture`` at ``step``; None if no slot is free for the picture."""
        options = self.options
        slot = self.pictures.slot(picture, sample, in_graph)
        if slot is None:
            return None
        kind = self._kinds.of(picture, step)
        if options.remembers and not picture.is_filled:
            kind = "whole"
        ranks = kind in PRUNING and picture.is_choice_due(step.index, kind, options.rank_every)
        is_warm = self._starts_warm and ranks and picture.has_ranks_for(kind)
        choice = step.index if ranks else picture.chosen
        picture.look_up(choice)
        return Call(kind, ranks, choice, is_warm, slot, picture, step.index, step.total)

    def _call_for_gradients(self, step: Step) -> Call:
        """A call that does not touch what is remembered: no gradient would reach the calls that computed it."""
        picture = self.pictures.beside(step)
        if not is_in_backward():
            picture.recorded.add(step.index)
        elif step.index not in picture.recorded:
            refuse_reentrant(self.differ)
        if step.picture is not None and step.index == step.total - 1:
            picture.is_over = True
        is_whole = self.options.remembers or self.options.steps.reads_past
        self.say_once(
            "gradients",
            "%s: a call that records gradients neither reads nor writes what is remembered; %s",
            self.differ,
            "it is computed whole" if is_whole else self._instead,
        )
        return Call(
            "whole" if is_whole else self._kinds.of_one(step), step=step.index, total=step.total, for_gradients=True
        )

    def ended(self, call: Call) -> None:
        """Note that ``call`` has finished without an exception."""
        picture = call.picture
        if picture is None or call.slot is None or picture.slot is not call.slot:
            return
        picture.end(call.step, call.kind, call.choice, call.ranks)
        if picture.is_over:
            self._kinds.look_back(picture, call.total)
            if call.slot.owner is None:
                picture.restart()  # nothing reads it any more


def _without_memory(options: Options) -> str:
    """In words: what a call does if nothing can be remembered of its picture."""
    if options.remembers:
        return "every step is whole"
    if options.steps.reads_past:
        return "a step's kind is judged only by the step"
    return "tokens are chosen in every call" if options.rank_every > 1 else "every ranking begins at uniform scores"
