"""What one call of a UNet tells its parts, compiled or not: its kind, whether tokens are chosen, what is remembered."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from atedm.policy.options import Options
from atedm.policy.schedule import Progress
from atedm.unet.blocks import feature_map_size
from atedm.unet.memory import Memory, Picture, Slot
from atedm.unet.recording import Recording
from atedm.unet.steps import Step, step_of

if TYPE_CHECKING:
    from atedm.unet.block import PrunedBlock
    from atedm.unet.reuse import UNetStage

logger = logging.getLogger("atedm")


@dataclass
class Call:
    """One call of the UNet.

    Attributes:
        kind: of its step, see :mod:`atedm.policy.schedule`. ranks: whether tokens are chosen in it.
        slot: what is remembered of its picture; None where nothing is, or where that cannot be told.
        picture: the one that ``slot`` belongs to. step: denoising step of ``total``, where it is known.
        recordings: those that see it, and which of their calls it is.
        before: what ran when it began, which runs on when it has ended: a UNet may call another.
    """

    kind: str = "pruned"
    ranks: bool = True
    slot: Slot | None = None
    picture: Picture | None = None
    step: int | None = None
    total: int | None = None
    recordings: list[tuple[Recording, int]] = field(default_factory=list)
    before: tuple[UNetCalls, Call] | None = None


_ONE_KIND = "{} keeps what one call does, and {} makes calls differ; expected settings with which every step is alike"

# The call that runs, and of which UNet: threads that share a UNet have one each.
_running: ContextVar[tuple[UNetCalls, Call] | None] = ContextVar("atedm_call", default=None)


class UNetCalls:
    """The calls of one UNet that was pruned by ``options``: a forward pre-hook of it, shared by its parts.

    Attributes:
        blocks: the pruned ones. stages: those that can reuse features. memory: of the pictures that are being made.
        recordings: those that are open.
        graph: what a graph of the whole UNet reads instead of a call of its own; torch guards graphs by it.
        is_told: whether ``graph`` has been set for the call that comes next, from outside of the graph.
    """

    def __init__(self, options: Options, scheduler: object | None = None) -> None:
        self.options = options
        self.blocks: list[PrunedBlock] = []
        self.stages: list[UNetStage] = []
        # Decided once: an attribute is what a compiled graph can be guarded by.
        self.is_constant = options.is_constant
        self._differ = options.why_not_constant()
        # What a call does of which nothing can be remembered.
        self._instead = "every step is whole" if options.remembers else "tokens are chosen in every call"
        self._forced: Call | None = None
        self.begin(scheduler)
        # What `follow` did: hooks of the UNet itself, which a copy of it has too, and how to undo the rest.
        self.target: nn.Module | None = None
        self._hooks: list[RemovableHandle] = []
        self._undo: list[Callable[[], None]] = []

    def begin(self, scheduler: object | None) -> None:
        """As it is before the first call."""
        self.scheduler = scheduler
        self.graph = self._untold()
        self.is_told = False
        self._outside = Call()  # the call that was told from outside
        self.memory = Memory()
        self.recordings: list[Recording] = []
        self._said: set[str] = set()

    def _untold(self) -> Call:
        """What a graph reads before any call was told to it."""
        return Call(kind=self.options.constant_kind or "pruned")

    def __getstate__(self) -> dict[str, Any]:
        """For a copy, which is not compiled, has no open recording and has made no picture yet."""
        own = {"graph": self._untold(), "_outside": Call(), "is_told": False}
        return {**self.__dict__, "_undo": [], "target": None, "recordings": [], **own}

    def say_once(self, what: str, message: str, *args: Any) -> None:
        # torch.compile cannot trace a logger, and every message is about a call that it need not see.
        if not torch.compiler.is_compiling() and what not in self._said:
            self._said.add(what)
            logger.warning(message, *args)

    def current(self) -> Call:
        """The call that runs; in a graph of the whole UNet the one that it is guarded by."""
        if torch.compiler.is_compiling():
            return self.graph
        running = _running.get()
        return running[1] if running is not None and running[0] is self else self._forced or self.graph

    @contextlib.contextmanager
    def all_of_kind(self, kind: str, sample: Tensor) -> Iterator[None]:
        """Make every call one of ``kind`` that follows a whole one with ``sample``: to count FLOPs, and to time."""
        slot = self._make_slot(_key(sample), sample) if self.options.remembers or kind == "reused" else None
        self._forced = Call(kind, slot=slot)
        try:
            yield
        finally:
            self._forced = None

    def __call__(self, unet: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook: tell the parts of the UNet of the call that begins."""
        if torch.compiler.is_compiling():
            # Runs once, while a graph of the whole UNet is made. What `graph` says is then an attribute that torch
            # guards the graph by, so there is a graph for each; one for "not told" is never made.
            if not self.is_constant:
                if torch.compiler.is_exporting():
                    raise RuntimeError(_ONE_KIND.format("torch.export", self._differ))
                if not self.is_told:
                    raise RuntimeError(
                        f"{self._differ} depends on the step, of which a graph of the whole UNet that was compiled "
                        "after atedm.apply knows nothing; expected atedm.apply once more, now on the compiled UNet or "
                        "pipeline"
                    )
                self.is_told = False
            return
        self._stop_running()  # what an interrupt left
        if self.is_constant and not self.recordings and self._forced is None:
            return
        if torch.jit.is_tracing():
            raise RuntimeError(_ONE_KIND.format("torch.jit.trace", self._differ))
        if hasattr(unet.__dict__.get("forward"), "_torchdynamo_orig_callable"):
            # `unet.forward = torch.compile(unet.forward)`: hooks run outside of the graph.
            self._follow_outside(args, kwargs)
            self.is_told = False
            return
        # A compiled UNet that runs uncompiled, to be recorded, has been followed outside already.
        call = self._outside if self.is_told else self._call(args, kwargs, in_graph=False)
        self.is_told = False
        self.check_unchanged()
        self._note(call)
        call.recordings = [(each, len(each.calls) - 1) for each in self.recordings if each.tokens]
        # For parts of the UNet that are compiled. A choice that is not their own they cannot see, so they choose.
        self.graph.kind, self.graph.slot, self.graph.ranks = call.kind, call.slot, True
        call.before = _running.get()
        _running.set((self, call))

    def _note(self, call: Call) -> None:
        for recording in self.recordings:
            recording.note(call.step, call.total, call.kind, self.memory.nbytes)

    def end(self, unet: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Forward hook, which runs after an exception too; then there is no output."""
        if torch.compiler.is_compiling():
            return
        running = _running.get()
        if running is not None and running[0] is self:
            if output is not None:
                self._succeed(running[1])
            self._stop_running()
        elif output is not None:
            self._succeed(self._outside)

    def _stop_running(self) -> None:
        running = _running.get()
        if running is not None and running[0] is self:
            _running.set(running[1].before)

    def _succeed(self, call: Call) -> None:
        """Note that ``call`` has come to its end."""
        picture = call.picture
        if picture is None or call.slot is None or picture.slot is not call.slot:
            return
        picture.is_filled = True  # every call before the first whole one is whole
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

    def _call(self, args: tuple[Any, ...], kwargs: dict[str, Any], *, in_graph: bool) -> Call:
        options = self.options
        sample = args[0] if args else kwargs["sample"]
        if self._forced is not None:
            return replace(self._forced)
        step = step_of(args[1] if len(args) > 1 else kwargs.get("timestep"), self.scheduler)
        picture = self._picture(step) if options.remembers or options.rank_every > 1 else None
        slot = None if picture is None else self._slot(picture, sample, in_graph)
        if slot is None:
            kind = "whole" if options.remembers else self._kind_of_one(step)
            return Call(kind=kind, step=step.index, total=step.total)
        kind = options.steps.kind(Progress(step.index, step.total, picture.kinds, picture.rate))
        if options.remembers and not picture.is_filled:
            kind = "whole"
        picture.begin_kind(step.index, kind)
        ranks = kind in ("whole", "reused") or picture.is_choice_due(step.index, kind, options.rank_every)
        return Call(kind, ranks, slot, picture, step.index, step.total)

    def _picture(self, step: Step) -> Picture | None:
        """The picture of a call; None, said once, where it cannot be told."""
        if step.picture is None:
            self.say_once(
                "picture",
                "%s: the timestep is no element of a scheduler's timesteps, so a call may belong to any picture; %s",
                self._differ,
                self._instead,
            )
            return None
        picture = self.memory.picture(step.picture)
        picture.begin(step.index, step.total)
        if picture.is_shared:
            self.say_once(
                "shared",
                "%s: several contents have the same timesteps, so what is remembered may be another's; %s",
                self._differ,
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
                self._differ,
                self._instead,
            )
        return slot

    def _make_slot(self, key: tuple[Any, ...], sample: Tensor) -> Slot:
        slot, device = Slot(key), sample.device
        is_cast = device.type != "meta" and torch.is_autocast_enabled(device.type)
        dtype = torch.get_autocast_dtype(device.type) if is_cast else sample.dtype
        # Ordinary tensors, which may be written in any mode.
        with torch.inference_mode(False):
            for part in (*self.blocks, *self.stages):
                part.start(slot, sample, dtype)
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

    def check_unchanged(self) -> None:
        """Refuse what other tools have done to the stages since :func:`atedm.apply`, which refuses it too."""
        for stage in self.stages:
            stage.check_unchanged()

    def follow(self, target: nn.Module, unet: nn.Module) -> None:
        """Follow the calls of ``unet``; outside of a graph of the whole UNet too, where there is one.

        Args:
            target: what is called: ``unet``, or what ``torch.compile(unet)`` returned, whose hooks are in no graph.
        """
        self.target = target
        self._hooks.append(unet.register_forward_pre_hook(self, with_kwargs=True))
        self._hooks.append(unet.register_forward_hook(self.end, always_call=True))
        if target is not unet:
            before = target.register_forward_pre_hook(
                lambda module, args, kwargs: self._follow_outside(args, kwargs), with_kwargs=True
            )
            after = target.register_forward_hook(lambda module, args, output: self._succeed(self._outside))
            self._undo += [before.remove, after.remove]
        compiled = unet._compiled_call_impl  # by unet.compile(), with the hooks in the graph
        if compiled is not None:

            def followed(*args: Any, **kwargs: Any) -> Any:
                self._follow_outside(args, kwargs)
                output = compiled(*args, **kwargs)
                self._succeed(self._outside)
                return output

            def restore() -> None:
                if unet._compiled_call_impl is followed:
                    unet._compiled_call_impl = compiled

            unet._compiled_call_impl = followed
            self._undo.append(restore)

    def stop_following(self) -> None:
        """Undo :meth:`follow`, and let go of what belongs to calls."""
        self._stop_running()
        self.target = None
        while self._hooks:
            self._hooks.pop().remove()
        while self._undo:
            self._undo.pop()()
        self.begin(None)

    def _follow_outside(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self.is_constant or self.recordings:
            call = self._outside = self._call(args, kwargs, in_graph=True)
            self.graph.kind, self.graph.slot, self.graph.ranks = call.kind, call.slot, call.ranks
            # A graph in which nothing depends on the call leaves this as it is.
            self.is_told = not self.is_constant
            if not any(each.tokens for each in self.recordings):  # else the UNet runs uncompiled, and notes it there
                self._note(call)
        self.check_unchanged()
        height, width = (args[0] if args else kwargs["sample"]).shape[-2:]
        for block in self.blocks:  # a graph warns of nothing, and looks at no module
            size = feature_map_size(block.level, height, width)
            if block.count_kept(*size) < math.prod(size):
                block.check_unchanged()


def _key(sample: Tensor) -> tuple[Any, ...]:
    return tuple(sample.shape), sample.dtype, sample.device
