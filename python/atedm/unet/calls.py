"""Follows the calls of a UNet and tells its parts, compiled or not, what each call is."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from atedm.policy.options import Options
from atedm.unet import running
from atedm.unet.errors import RankedNaN
from atedm.unet.gradients import records_gradients
from atedm.unet.graph_call import GraphCall
from atedm.unet.graphs import check_own_forward, count_graphs, forward_is_compiled
from atedm.unet.memory import Memory
from atedm.unet.parts import Parts
from atedm.unet.planner import Call, Planner
from atedm.unet.recording import Recording

_TRACED = "torch.jit.trace records a single call, and with {} calls differ; expected settings under which all are alike"

_UNTOLD_GRAPH = (
    "{} makes calls differ, and a graph of the whole UNet that was compiled after atedm.apply cannot distinguish them; "
    "expected atedm.apply once more, now on the compiled UNet or pipeline, or, for torch.export, settings with which "
    "every step is alike"
)

_DIRECT = (
    "%s makes calls differ, and a part of the UNet was called on its own, so its step is unknown; it runs as in a %s "
    "step"
)


@dataclass
class Following:
    """What :func:`atedm.apply` has put on a UNet to follow its calls.

    Attributes:
        target: the object that is called: the UNet, or what wraps it. hooks: on the UNet itself; a copy of the UNet
            has them too.
        undo: functions that remove the rest.
    """

    target: nn.Module | None = None
    hooks: list[RemovableHandle] = field(default_factory=list)
    undo: list[Callable[[], None]] = field(default_factory=list)

    @property
    def is_in_place(self) -> bool:
        return all(hook.id in (hook.hooks_dict_ref() or ()) for hook in self.hooks)

    def check(self) -> None:
        """Refuse calls that cannot be followed: another tool may have cleared the module's hooks."""
        if not self.is_in_place:
            raise RuntimeError(
                "the forward hooks that atedm.apply put on the UNet are gone, so its calls cannot be followed; "
                "expected them there: call atedm.apply again, or atedm.remove"
            )

    def end(self) -> None:
        self.target = None
        while self.hooks:
            self.hooks.pop().remove()
        while self.undo:
            self.undo.pop()()

    def of_a_copy(self) -> Following:
        """What a copy of the UNet, which is not compiled, has of this."""
        return replace(self, target=None, undo=[])


class UNetCalls:
    """The calls of one UNet that was pruned with ``options``: the UNet's forward pre-hook, which its parts share.

    Attributes:
        parts: the UNet's modules whose forwards are atedm's. recordings: the open ones.
        planner: knows what each call is, and what is remembered. following: how the UNet's calls are followed.
        told: what graphs of the UNet, or of its parts, read about the call that they run.
    """

    def __init__(self, options: Options, scheduler: object | None = None) -> None:
        self.options = options
        self.parts = Parts(options)
        # Decided once and kept as an attribute, because torch can guard a compiled graph by an attribute.
        self.is_constant = options.is_constant
        self.begin(scheduler)
        self.following = Following()

    def begin(self, scheduler: object | None) -> None:
        """Reset to the state before the first call."""
        self.planner = Planner(self.options, self.parts.start, scheduler)
        self.told = self._untold()
        self.parts.begin()
        self.recordings: list[Recording] = []

    def _untold(self) -> GraphCall:
        return GraphCall(self.options.constant_kind or "pruned")

    def __getstate__(self) -> dict[str, Any]:
        """The state for a copy, which is not compiled, has no open recording and has made no picture yet."""
        own = {"told": self._untold(), "recordings": []}
        return {**self.__dict__, "following": self.following.of_a_copy(), **own}

    @property
    def is_of_a_copy(self) -> bool:
        """Whether these are not the calls of the UNet that was pruned, but of a copy of it or of one of its blocks."""
        return self.following.target is None

    @property
    def memory(self) -> Memory:
        """What is remembered of the pictures that are being made."""
        return self.planner.pictures.memory

    def say_once(self, what: str, message: str, *args: Any) -> None:
        # torch.compile cannot trace a logger. The messages are about single calls, so a trace needs none.
        if not torch.compiler.is_compiling():
            self.planner.say_once(what, message, *args)

    def current(self) -> Call:
        """The call that runs; while torch traces a graph, the call whose values guard the graph."""
        if torch.compiler.is_compiling():
            return self.told.call
        call = running.running(self)
        if call is not None:
            return call
        self.following.check()
        if self.planner.forced is not None:
            return self.planner.forced
        # A part of a compiled UNet that runs uncompiled gets here too, and so does a checkpoint that computes again.
        if self.told.running is None and not torch.is_grad_enabled() and not self.is_constant:
            self.planner.say_once("direct", _DIRECT, self.planner.differ, self.told.call.kind)
        return self.told.call

    def __call__(self, unet: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook: tell the parts of the UNet which call begins."""
        if torch.compiler.is_compiling():
            # Runs once, while torch traces a graph of the whole UNet. Torch guards the graph by the attributes of
            # `told`, so there is a graph for each kind. No graph is made for a call that nobody announced.
            # torch.compiler.is_exporting() would not help: before torch 2.13 it is true inside torch.compile too.
            if not self.is_constant and not self.told.is_outside:
                raise RuntimeError(_UNTOLD_GRAPH.format(self.planner.differ))
            return
        left = running.stop(self)
        if left is not None:  # an interrupt left it running
            left.break_off()
        self.following.check()
        if self.told.is_followed_outside:
            # A compiled UNet that runs uncompiled, because it is being recorded or because torch makes no more graphs.
            self._begin(self.told.running)
            return
        self.parts.check_unchanged()
        compiled = self.parts.compiled
        if compiled:
            count_graphs(unet, self, compiled)
            for module in compiled:
                check_own_forward(module)
        in_graph = bool(compiled)
        if forward_is_compiled(unet):
            check_own_forward(unet)
            in_graph = True
        if in_graph:
            self.parts.count_kept(*latent_size(args, kwargs))
        if self.is_constant and not self.recordings and self.planner.forced is None:
            return
        if torch.jit.is_tracing():
            raise RuntimeError(_TRACED.format(self.planner.differ))
        call = self._plan(unet, args, kwargs, in_graph)
        self._note(call)
        self._begin(call)

    def _plan(self, unet: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], in_graph: bool) -> Call:
        """Plan the call that begins and tell the graphs about it. ``in_graph``: whether there are any graphs."""
        if in_graph:
            self.told.claim()
        try:
            for_gradients = records_gradients(unet, args, kwargs)
            call = self.planner.call(args, kwargs, in_graph=in_graph, for_gradients=for_gradients)
        except BaseException:
            self.told.release()
            raise
        self.told.tell(call, in_graph)
        return call

    def _begin(self, call: Call) -> None:
        """Note that ``call`` runs from now on, uncompiled except for parts of the UNet."""
        call.recordings = [(each, len(each.calls) - 1) for each in self.recordings if each.tokens]
        running.begin(self, call)

    def _note(self, call: Call) -> None:
        for recording in self.recordings:
            recording.note(call.step, call.total, call.kind, self.memory.nbytes, call.run)

    def end(self, unet: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Forward hook. It runs after an exception too; ``output`` is then None."""
        if torch.compiler.is_compiling():
            return
        error = sys.exc_info()[1] if output is None else None
        if isinstance(error, RankedNaN) and error.step is None:  # where all calls are alike, nothing has looked it up
            error.set_step(self.planner.step(args, kwargs).index)
        call = running.stop(self)
        if call is not None and not self.told.is_followed_outside:  # else end_outside ends the call
            self._ended(call, output is not None)

    def _ended(self, call: Call, is_complete: bool) -> None:
        self.told.end(call)
        if is_complete:
            self.planner.ended(call)
        else:
            call.break_off()

    def stop_following(self) -> None:
        """Remove what follows the calls, and free what belongs to them."""
        running.stop(self)
        self.following.end()
        self.begin(None)

    def begin_outside(self, unet: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Prepare for the run of a graph of the whole UNet, which is about to begin."""
        self.parts.check_unchanged()
        self.parts.count_kept(*latent_size(args, kwargs))
        if not self.is_constant or self.recordings:
            self._note(self._plan(unet, args, kwargs, in_graph=True))
            self.told.is_outside = True

    def end_outside(self, is_complete: bool) -> None:
        """Note that the graph's run has ended. ``is_complete`` is False if it was interrupted or raised."""
        call = self.told.running
        if call is not None:
            self._ended(call, is_complete)


def latent_size(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[int, int]:
    """Height and width of the sample that a UNet is called with."""
    height, width = (args[0] if args else kwargs["sample"]).shape[-2:]
    return height, width
