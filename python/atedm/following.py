"""Telling a UNet's blocks which phase of the schedule a call is in, compiled or not."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from atedm.blocks import feature_map_size
from atedm.pruning import PrunedForward
from atedm.schedule import denoising_step, order_of, timestep_value
from atedm.state import PruningState

# Arguments of pipelines that guide by three or more parts: perturbed attention, an input picture, edits.
_MORE_THAN_HALVES = ("pag_scale", "image_guidance_scale", "edit_guidance_scale")


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
        if not state.is_told:  # a compiled UNet that runs uncompiled, to be recorded, was followed outside already
            _follow(state, unet, args, kwargs)
        state.is_told = False
        for recording in state.recordings:
            recording.calls.append(state.step)

    def follow_outside(self, target: nn.Module, unet: nn.Module) -> None:
        """Follow the steps outside of a graph of the whole UNet too, where there is one.

        Args:
            target: what is called: ``unet``, or what ``torch.compile(unet)`` returned, whose hooks are in no graph.
        """
        if target is not unet:
            hook = target.register_forward_pre_hook(
                lambda module, args, kwargs: self._follow_outside(unet, args, kwargs), with_kwargs=True
            )
            self.undo.append(hook.remove)
        compiled = unet._compiled_call_impl  # by unet.compile(), with the hooks in the graph
        if compiled is not None:

            def followed(*args: Any, **kwargs: Any) -> Any:
                self._follow_outside(unet, args, kwargs)
                return compiled(*args, **kwargs)

            def restore() -> None:
                if unet._compiled_call_impl is followed:
                    unet._compiled_call_impl = compiled

            unet._compiled_call_impl = followed
            self.undo.append(restore)

    def stop_following(self) -> None:
        """Undo :meth:`follow_outside`, and let go of what belongs to calls."""
        while self.undo:
            self.undo.pop()()
        self.state.begin(None, None)
        for patch in self.patches:
            patch.kept = None

    def _follow_outside(self, unet: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        _follow(self.state, unet, args, kwargs)
        # A graph in which nothing depends on the call leaves this as it is.
        self.state.is_told = not self.state.is_constant
        height, width = (args[0] if args else kwargs["sample"]).shape[-2:]
        for patch in self.patches:
            patch.count_kept(*feature_map_size(patch.level, height, width))  # a graph warns of nothing
        if not self.state.ranks_anew:
            for patch in self.patches:
                patch.hold_kept()


def _running_pipeline(unet: nn.Module) -> Any:
    """The pipeline that calls ``unet`` at this moment; None where no pipeline does.

    Several may share a UNet (``from_pipe``), each with a scheduler and a guidance of its own, and none tells the UNet
    which it is: only the callers know.
    """
    frame = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if code.co_name == "__call__" and code.co_varnames[:1] == ("self",):
            caller = frame.f_locals.get("self")
            denoiser = getattr(caller, "__dict__", {}).get("unet")
            if (
                denoiser is not None
                and getattr(denoiser, "_orig_mod", denoiser) is unet
                and hasattr(caller, "scheduler")
            ):
                return caller
        frame = frame.f_back
    return None


@functools.cache
def _guides_by_more_than_halves(pipeline: type) -> str | None:
    parameters = inspect.signature(pipeline.__call__).parameters
    return next((name for name in _MORE_THAN_HALVES if name in parameters), None)


def check_halves(pipeline: object) -> None:
    """ValueError where a batch of ``pipeline`` is no two halves of guidance, of which one could choose for both."""
    scale = _guides_by_more_than_halves(type(pipeline))
    if scale is not None:
        raise ValueError(
            f"share_guidance is set, and {type(pipeline).__name__} has a {scale}; expected share_guidance=False: "
            "the parts that it guides by are no two halves"
        )


def _follow(state: PruningState, unet: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Set what of ``state`` depends on the call of the UNet, for one with these arguments."""
    options = state.options
    if options.is_constant and not state.recordings:
        return
    timestep = args[1] if len(args) > 1 else kwargs.get("timestep")
    pipeline = _running_pipeline(unet)
    if pipeline is None and state.pipeline is not None:
        pipeline = state.pipeline()
    if pipeline is not None:
        # Asked anew at each call: the scheduler may have been exchanged.
        state.scheduler = pipeline.scheduler
    found = None if timestep is None else denoising_step(state.scheduler, timestep)
    state.step = None if found is None else found[0]
    if options.share_guidance:
        if pipeline is not None:
            check_halves(pipeline)
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
        if found is None:
            state.ranks_anew = state.period.is_due(-value, state.light)
        else:
            order = order_of(state.scheduler)
            state.ranks_anew = state.period.is_due(found[0], state.light, state.scheduler.timesteps, order)
