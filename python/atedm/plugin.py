"""Putting pruning into a diffusers pipeline and taking it out again."""

from __future__ import annotations

import contextlib
import logging
import weakref
from collections.abc import Iterator
from dataclasses import fields
from typing import Any, TypeVar

import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import nn

from atedm.blocks import AttentionBlock, attention_blocks, why_not_prunable
from atedm.options import Options
from atedm.pruning import PrunedForward, PruningState
from atedm.recording import Recording
from atedm.schedule import denoising_step, timestep_value

logger = logging.getLogger("atedm")

Pipeline = TypeVar("Pipeline")


class _StepFollower:
    """Forward pre-hook of the UNet: tells its blocks which phase of the schedule a call is in."""

    def __init__(self, state: PruningState, patches: list[PrunedForward]) -> None:
        self.state = state
        self.patches = patches

    def __call__(self, unet: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        state, schedule = self.state, self.state.options.schedule
        constant = False if schedule is None else schedule.constant_phase
        if torch.compiler.is_compiling():
            if constant is None:
                raise RuntimeError(
                    "schedule is DSAP and the whole UNet is one graph, in which the denoising step cannot be followed; "
                    "expected schedule=None, regional compilation (unet.compile_repeated_blocks()), or fullgraph=False"
                )
            return
        timestep = args[1] if len(args) > 1 else kwargs.get("timestep")
        pipeline = None if state.pipeline is None else state.pipeline()
        if pipeline is not None:
            # Asked anew at each call: pipe.scheduler may have been exchanged.
            state.scheduler = pipeline.scheduler
        wanted = constant is None or bool(state.recordings)
        found = denoising_step(state.scheduler, timestep) if wanted and timestep is not None else None
        state.call += 1
        state.step = None if found is None else found[0]
        if constant is not None:
            state.light = constant
        elif found is not None:
            state.light = schedule.is_light(*found)
        else:
            value = None if timestep is None else timestep_value(timestep)
            if value is None:
                raise ValueError("timestep has no value (a meta tensor?); expected one with schedule=DSAP(...)")
            state.light = schedule.is_light_at(value)


def _unet_of(target: object) -> UNet2DConditionModel:
    unet = getattr(target, "unet", target)
    unet = getattr(unet, "_orig_mod", unet)  # what torch.compile wraps
    if not isinstance(unet, UNet2DConditionModel):
        raise TypeError(
            f"pipe is a {type(target).__name__} with the denoiser {type(unet).__name__}; "
            "expected a pipeline with a UNet2DConditionModel as its unet, or that UNet itself"
        )
    return unet


def _follower(unet: nn.Module) -> _StepFollower | None:
    """The hook that holds all there is to know about what was applied; None where nothing was."""
    return next((hook for hook in unet._forward_pre_hooks.values() if isinstance(hook, _StepFollower)), None)


def _patches(unet: nn.Module) -> list[PrunedForward]:
    follower = _follower(unet)
    return [] if follower is None else follower.patches


def _state_of(unet: nn.Module) -> PruningState | None:
    follower = _follower(unet)
    return None if follower is None else follower.state


def _uninstall(unet: nn.Module) -> None:
    """Raises before anything is changed, where a forward of ours cannot be found any more."""
    patches = _patches(unet)
    for patch in patches:
        if patch not in (patch.module.__dict__.get("forward"), patch.module.__dict__.get("_old_forward")):
            raise RuntimeError(
                f"the forward of {patch.name} has been replaced since atedm.apply; expected atedm's: undo that first"
            )
    for patch in patches:
        module = patch.module
        if module.__dict__.get("forward") is not patch:
            # An accelerate hook came after us and keeps what it wraps under this name.
            module._old_forward = patch.previous or type(module).forward.__get__(module)
        elif patch.previous is None:
            del module.forward
        else:
            module.forward = patch.previous
    for key in [key for key, hook in unet._forward_pre_hooks.items() if isinstance(hook, _StepFollower)]:
        del unet._forward_pre_hooks[key]
        unet._forward_pre_hooks_with_kwargs.pop(key, None)


def _install(unet: nn.Module, blocks: list[AttentionBlock], state: PruningState) -> None:
    patches = [PrunedForward(block.name, block.module, block.level, block.whole_when_light, state) for block in blocks]
    for patch in patches:
        patch.module.forward = patch
    unet.register_forward_pre_hook(_StepFollower(state, patches), with_kwargs=True)


def _blocks_to_prune(unet: UNet2DConditionModel, options: Options) -> list[AttentionBlock]:
    blocks = attention_blocks(unet)
    available = sorted({block.level for block in blocks})
    if not blocks:
        raise ValueError("the UNet has no attention block; expected at least one to prune")
    for name, levels in (
        ("levels", options.levels),
        ("ratio", options.ratio if isinstance(options.ratio, dict) else ()),
    ):
        unknown = sorted(set(levels or ()) - set(available), key=str)
        if unknown:
            raise ValueError(f"{name} names level {unknown[0]!r}; expected levels with attention: {available}")
    chosen = [block for block in blocks if options.levels is None or block.level in options.levels]
    if isinstance(options.ratio, dict):
        chosen = [block for block in chosen if options.ratio_at(block.level) > 0]
    for block in chosen:
        reason = why_not_prunable(block.module) if not _is_ours(block.module) else None
        if reason is not None:
            raise ValueError(f"{block.name} cannot be pruned: {reason}")
    if options.placement == "paper":
        # Pruned after their only layer, such blocks would have nothing left to save.
        chosen = [block for block in chosen if len(block.module.transformer_blocks) > 1]
    if not chosen:
        raise ValueError(
            f"no attention block is left to prune with ratio={options.ratio}, levels={options.levels} and "
            f"placement={options.placement!r}; "
            f"expected some of the levels {available} with"
            + (" more than one layer" if options.placement == "paper" else " attention")
        )
    return chosen


def _is_ours(module: nn.Module) -> bool:
    return isinstance(module.__dict__.get("forward"), PrunedForward)


def apply(pipe: Pipeline, *, scheduler: object | None = None, **options: Any) -> Pipeline:
    """Prune the tokens of a Stable Diffusion XL pipeline's UNet from now on (AT-EDM); inference only.

    The modules stay the ones that they were: each attention block gets a ``forward`` of its own until
    :func:`remove`. Applying again replaces the earlier settings. If anything is wrong, nothing is changed.

    Args:
        pipe: a diffusers pipeline with a ``UNet2DConditionModel``, or such a UNet.
        ratio: the part of the tokens to drop, from 0 up to 1, or a mapping from level to that part (levels that it
            does not name stay whole). Default 0.63, the paper's main setting.
        levels: resolution levels to prune, from 1 at the latent's own resolution; SDXL has attention at 2 and 3.
            Default: all. ``(3,)`` is the paper's AT-EDM†.
        schedule: an :class:`atedm.DSAP` (default: the paper's, light for the first 0.3 of the steps), or None to
            prune everywhere at every step.
        placement: ``"early"`` prunes right after the first layer's self-attention and recovers after the output
            projection; ``"paper"`` prunes after that layer and recovers before the projection. The result is the same
            up to rounding; early does less work.
        ranking: ``"self"`` or ``"cross"`` attention, or a function from ``q, k [B, H, N, D]`` and ``lse [B, H, N]``
            of the first self-attention to scores ``[B, H', N]`` (float32).
        recovery: ``"similarity"``, ``"zeros"`` or ``"bicubic"``.
        reduction: how heads are joined, ``"rms"`` or ``"mean"``.
        keep_multiple: round the number of kept tokens to a multiple of this.
        max_iterations, tolerance: of the power iteration, see :func:`atedm_kernels.weighted_page_rank`.
        scheduler: whose steps ``schedule`` follows when ``pipe`` is a UNet. A pipeline's own scheduler is followed
            by itself; without either, the step is judged by the timestep's value.

    Returns:
        ``pipe``.

    Raises:
        TypeError, ValueError: an argument that does not fit, a UNet with nothing to prune, or one with a module that
            cannot be pruned; the message says which.
    """
    unet = _unet_of(pipe)
    known = [f.name for f in fields(Options)]
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise TypeError(f"apply got {unknown[0]!r}; expected some of {', '.join(known)}, scheduler")
    if scheduler is not None and not hasattr(scheduler, "timesteps"):
        raise TypeError(f"scheduler is {scheduler!r}; expected a diffusers scheduler, which has timesteps")
    settings = Options(**options)
    blocks = _blocks_to_prune(unet, settings)
    pipeline = weakref.ref(pipe) if hasattr(pipe, "scheduler") else None
    if pipeline is not None and scheduler is not None:
        raise ValueError("scheduler is given with a pipeline; expected None: the pipeline's own scheduler is followed")
    earlier = _state_of(unet)
    _uninstall(unet)
    schedule = settings.schedule
    # A compiled UNet is traced with this phase; one that depends on the step is told at each call.
    light = schedule is not None and schedule.constant_phase is True
    state = PruningState(settings, scheduler, pipeline, light=light)
    if pipeline is not None:
        state.scheduler = pipe.scheduler
    if earlier is not None:  # an open recording goes on
        state.recordings, state.call = earlier.recordings, earlier.call
    _install(unet, blocks, state)
    logger.info("pruning %d of %d attention blocks", len(blocks), len(attention_blocks(unet)))
    return pipe


def remove(pipe: Pipeline) -> Pipeline:
    """Take pruning out again; the UNet is exactly what it was. Does nothing where nothing was applied.

    Raises:
        TypeError: ``pipe`` is neither a pipeline with a ``UNet2DConditionModel`` nor such a UNet.
        RuntimeError: another tool has wrapped a pruned block since; nothing is changed.
    """
    _uninstall(_unet_of(pipe))
    return pipe


@contextlib.contextmanager
def applied(pipe: Pipeline, *, scheduler: object | None = None, **options: Any) -> Iterator[Pipeline]:
    """:func:`apply` for the length of a ``with`` block; afterwards what was in force before it is again."""
    unet = _unet_of(pipe)
    earlier = _state_of(unet)
    apply(pipe, scheduler=scheduler, **options)
    try:
        yield pipe
    finally:
        _uninstall(unet)
        if earlier is not None:
            _install(unet, _blocks_to_prune(unet, earlier.options), earlier)


def pruned_blocks(pipe: object) -> list[str]:
    """Module paths of the attention blocks that :func:`apply` prunes, in the order in which they run."""
    return [patch.name for patch in _patches(_unet_of(pipe))]


@contextlib.contextmanager
def record(pipe: object) -> Iterator[Recording]:
    """Collect the kept tokens of every block and step while the ``with`` block runs.

    Copies each kept set to the CPU, so it slows a GPU down: for looking, not for timing.

    Raises:
        ValueError: nothing is applied to ``pipe``.
    """
    state = _state_of(_unet_of(pipe))
    if state is None:
        raise ValueError("pipe is not pruned; expected one that atedm.apply has been called on")
    recording = Recording()
    state.recordings.append(recording)
    state.call = -1
    try:
        yield recording
    finally:
        # In place: applying again inside the block has handed the list on.
        state.recordings[:] = [other for other in state.recordings if other is not recording]
