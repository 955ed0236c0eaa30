"""Telling a UNet's blocks which phase of the schedule a call is in, compiled or not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from atedm.pruning import PrunedForward, PruningState
from atedm.schedule import denoising_step, timestep_value


class StepFollower:
    """Forward pre-hook of the UNet that holds all there is to know about what was applied to it."""

    def __init__(self, state: PruningState, patches: list[PrunedForward]) -> None:
        self.state = state
        self.patches = patches
        # Undo what follow_outside did.
        self.undo: list[Callable[[], None]] = []

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "undo": []}  # a copied UNet is not compiled

    def __call__(self, unet: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        state = self.state
        if torch.compiler.is_compiling():
            # Runs once, while a graph of the whole UNet is made. The phase is then an attribute that the graph is
            # guarded by, so there is a graph for each; nobody having told it is another, which is never made.
            if not state.is_constant:
                if not state.is_told:
                    raise RuntimeError(
                        "schedule, rank_every or share_guidance depends on the step, of which a graph of the whole "
                        "UNet that was compiled after atedm.apply knows nothing; expected atedm.apply once more, "
                        "now on the compiled UNet or pipeline"
                    )
                state.is_told = False
            return
        state.call += 1
        _follow(state, args, kwargs)
        for recording in state.recordings:
            recording.calls.append(state.step)

    def follow_outside(self, target: nn.Module, unet: nn.Module) -> None:
        """Follow the steps outside of a graph of the whole UNet too, where there is one.

        Args:
            target: what is called: ``unet``, or what ``torch.compile(unet)`` returned, whose hooks are in no graph.
        """
        if target is not unet:
            hook = target.register_forward_pre_hook(
                lambda module, args, kwargs: self._follow_outside(args, kwargs), with_kwargs=True
            )
            self.undo.append(hook.remove)
        compiled = unet._compiled_call_impl  # by unet.compile(), with the hooks in the graph
        if compiled is not None:

            def followed(*args: Any, **kwargs: Any) -> Any:
                self._follow_outside(args, kwargs)
                return compiled(*args, **kwargs)

            def restore() -> None:
                if unet._compiled_call_impl is followed:
                    unet._compiled_call_impl = compiled

            unet._compiled_call_impl = followed
            self.undo.append(restore)

    def _follow_outside(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        _follow(self.state, args, kwargs)
        if not self.state.ranks_anew:
            for patch in self.patches:
                patch.hold_kept()


def _follow(state: PruningState, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Set what of ``state`` depends on the call of the UNet, for one with these arguments."""
    state.is_told = True
    timestep = args[1] if len(args) > 1 else kwargs.get("timestep")
    pipeline = None if state.pipeline is None else state.pipeline()
    if pipeline is not None:
        # Asked anew at each call: pipe.scheduler may have been exchanged.
        state.scheduler = pipeline.scheduler
    options = state.options
    wanted = not options.is_constant or bool(state.recordings)
    found = denoising_step(state.scheduler, timestep) if wanted and timestep is not None else None
    state.step = None if found is None else found[0]
    if options.share_guidance:
        # A UNet on its own is taken at the user's word.
        state.halves = pipeline is None or getattr(pipeline, "do_classifier_free_guidance", True)
    has_phases = options.schedule is not None and options.schedule.constant_phase is None
    if not has_phases and options.rank_every == 1:
        return
    value = None
    if found is None:
        value = None if timestep is None else timestep_value(timestep)
        if value is None:
            raise ValueError(
                "timestep has no value (a meta tensor?); expected one with schedule=DSAP(...) or rank_every > 1"
            )
    if has_phases:
        state.light = options.schedule.is_light_at(value) if found is None else options.schedule.is_light(*found)
    if options.rank_every > 1:
        state.ranks_anew = state.period.is_due(-value if found is None else found[0], state.light, found is not None)
