"""What one call of a UNet tells its pruned blocks, compiled or not: which phase it is in, whether tokens are chosen."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from atedm.policy.options import Options
from atedm.unet.blocks import feature_map_size
from atedm.unet.memory import Memory, Picture
from atedm.unet.recording import Recording
from atedm.unet.steps import Step, step_of

if TYPE_CHECKING:
    from atedm.unet.block import PrunedBlock

logger = logging.getLogger("atedm")


@dataclass
class Call:
    """One call of the UNet.

    Attributes:
        light: whether it is in DSAP's light phase. ranks: whether tokens are chosen in it.
        picture: what is remembered of its picture; None where nothing is, or where it cannot be told. choice: the
            number of the choice that serves it.
        step: denoising step, where it is known. recordings: those that see it, and which of their calls it is.
        before: what ran when it began, which runs on when it has ended: a UNet may call another.
    """

    light: bool = False
    ranks: bool = True
    picture: Picture | None = None
    choice: int = 0
    step: int | None = None
    recordings: list[tuple[Recording, int]] = field(default_factory=list)
    before: tuple[UNetCalls, Call] | None = None


_ONE_KIND = (
    "{} keeps what one call does, and schedule or rank_every makes calls differ; expected rank_every=1 and "
    "schedule=None or a DSAP of 0 or 1"
)

# The call that runs, and of which UNet: threads that share a UNet have one each.
_running: ContextVar[tuple[UNetCalls, Call] | None] = ContextVar("atedm_call", default=None)


class UNetCalls:
    """The calls of one UNet that was pruned by ``options``: a forward pre-hook of it, shared by its pruned blocks.

    Attributes:
        blocks: the pruned ones. memory: of the pictures that are being made. recordings: those that are open.
        graph: what a graph of the whole UNet reads instead of a call of its own; torch guards graphs by it.
        is_told: whether ``graph`` has been set for the call that comes next, from outside of the graph.
    """

    def __init__(self, options: Options, scheduler: object | None = None) -> None:
        self.options = options
        self.blocks: list[PrunedBlock] = []
        # Decided once: an attribute is what a compiled graph can be guarded by.
        self.is_constant = options.is_constant
        self.begin(scheduler)
        # What `follow` did: hooks of the UNet itself, which a copy of it has too, and how to undo the rest.
        self.target: nn.Module | None = None
        self._hooks: list[RemovableHandle] = []
        self._undo: list[Callable[[], None]] = []

    def begin(self, scheduler: object | None) -> None:
        """As it is before the first call."""
        schedule = self.options.schedule
        self.scheduler = scheduler
        self.graph = Call(light=(None if schedule is None else schedule.constant_phase) is True)
        self.is_told = False
        # The call that was told from outside, and the picture whose choices the blocks hold for graphs.
        self._outside = Call()
        self._owner: Picture | None = None
        self.memory = Memory(self.options.rank_every)
        self.recordings: list[Recording] = []
        self._said: set[str] = set()
        for block in self.blocks:
            block.kept = None

    def __getstate__(self) -> dict[str, Any]:
        """For a copy, which is not compiled, has no open recording and has made no picture yet."""
        own = {"graph": Call(light=self.graph.light), "_outside": Call(), "_owner": None}
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
        return running[1] if running is not None and running[0] is self else self.graph

    def __call__(self, unet: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook: tell the blocks of the call that begins."""
        if torch.compiler.is_compiling():
            # Runs once, while a graph of the whole UNet is made. What `graph` says is then an attribute that torch
            # guards the graph by, so there is a graph for each; one for "not told" is never made.
            if not self.is_constant:
                if torch.compiler.is_exporting():
                    raise RuntimeError(_ONE_KIND.format("torch.export"))
                if not self.is_told:
                    raise RuntimeError(
                        "schedule or rank_every depends on the step, of which a graph of the whole UNet that was "
                        "compiled after atedm.apply knows nothing; expected atedm.apply once more, now on the compiled "
                        "UNet or pipeline"
                    )
                self.is_told = False
            return
        self._stop_running()  # what an interrupt left
        if self.is_constant and not self.recordings:
            return
        if torch.jit.is_tracing():
            raise RuntimeError(_ONE_KIND.format("torch.jit.trace"))
        if hasattr(unet.__dict__.get("forward"), "_torchdynamo_orig_callable"):
            # `unet.forward = torch.compile(unet.forward)`: hooks run outside of the graph.
            self._follow_outside(args, kwargs)
            self.is_told = False
            return
        # A compiled UNet that runs uncompiled, to be recorded, has been followed outside already.
        call = self._outside if self.is_told else self._call(args, kwargs)
        self._owner = None
        self.is_told = False
        for recording in self.recordings:
            recording.calls.append(call.step)
        call.recordings = [(recording, len(recording.calls) - 1) for recording in self.recordings]
        # For parts of the UNet that are compiled. A choice that is not their own they cannot see, so they choose.
        self.graph.light, self.graph.ranks = call.light, True
        call.before = _running.get()
        _running.set((self, call))

    def end(self, unet: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Forward hook, which runs after an exception too."""
        if not torch.compiler.is_compiling():
            self._stop_running()

    def _stop_running(self) -> None:
        running = _running.get()
        if running is not None and running[0] is self:
            _running.set(running[1].before)

    def _call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        step = step_of(args[1] if len(args) > 1 else kwargs.get("timestep"), self.scheduler)
        call = Call(light=self._is_light(step), step=step.index)
        if self.options.rank_every > 1:
            if step.picture is None:
                self.say_once(
                    "picture",
                    "rank_every=%d: the timestep is no element of a scheduler's timesteps, so a call may belong to any "
                    "picture; tokens are chosen in every call",
                    self.options.rank_every,
                )
            else:
                call.picture = self.memory.picture(step.picture)
                call.ranks = call.picture.period.is_due(step.index, step.total, call.light)
                call.choice = call.picture.period.choice
                if call.picture.period.is_shared:
                    self.say_once(
                        "shared",
                        "rank_every=%d: several contents have the same timesteps, so a choice may be another's; tokens "
                        "are chosen in every call",
                        self.options.rank_every,
                    )
        return call

    def _is_light(self, step: Step) -> bool:
        schedule = self.options.schedule
        if schedule is None:
            return False
        if schedule.constant_phase is not None:
            return schedule.constant_phase
        if step.index is not None:
            return schedule.is_light(step.index, step.total)
        value = step.value()
        if value is None:
            raise ValueError("timestep has no value (a meta tensor?); expected one with schedule=DSAP(...)")
        return schedule.is_light_at(value)

    def follow(self, target: nn.Module, unet: nn.Module) -> None:
        """Follow the calls of ``unet``; outside of a graph of the whole UNet too, where there is one.

        Args:
            target: what is called: ``unet``, or what ``torch.compile(unet)`` returned, whose hooks are in no graph.
        """
        self.target = target
        self._hooks.append(unet.register_forward_pre_hook(self, with_kwargs=True))
        self._hooks.append(unet.register_forward_hook(self.end, always_call=True))
        if target is not unet:
            hook = target.register_forward_pre_hook(
                lambda module, args, kwargs: self._follow_outside(args, kwargs), with_kwargs=True
            )
            self._undo.append(hook.remove)
        compiled = unet._compiled_call_impl  # by unet.compile(), with the hooks in the graph
        if compiled is not None:

            def followed(*args: Any, **kwargs: Any) -> Any:
                self._follow_outside(args, kwargs)
                return compiled(*args, **kwargs)

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
            call = self._outside = self._call(args, kwargs)
            ranks = call.ranks or call.picture is not self._owner
            if ranks and not call.ranks and self._owner is not None:
                self.say_once(
                    "turns",
                    "rank_every=%d: pictures take turns on a compiled UNet, which remembers one; tokens are chosen in "
                    "every call that follows another picture's",
                    self.options.rank_every,
                )
            self.graph.light, self.graph.ranks = call.light, ranks
            self._owner = call.picture
            if ranks:
                for block in self.blocks:  # should the graph fail to choose, nothing is there
                    block.kept = None
            # A graph in which nothing depends on the call leaves this as it is.
            self.is_told = not self.is_constant
        height, width = (args[0] if args else kwargs["sample"]).shape[-2:]
        for block in self.blocks:  # a graph warns of nothing, and looks at no module
            size = feature_map_size(block.level, height, width)
            if block.count_kept(*size) < math.prod(size):
                block.check_unchanged()
        if not self.graph.ranks:
            for block in self.blocks:
                block.hold_kept()
