"""Putting pruning into a diffusers pipeline and taking it out again."""

from __future__ import annotations

import contextlib
import logging
import weakref
from collections.abc import Iterator
from typing import Any, TypeVar

import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import nn

from atedm.blocks import AttentionBlock, attention_blocks, why_not_prunable
from atedm.following import StepFollower, check_halves
from atedm.options import Options, resolve
from atedm.pruning import PrunedForward
from atedm.recording import Recording
from atedm.state import PruningState

logger = logging.getLogger("atedm")

Pipeline = TypeVar("Pipeline")

# What was removed from each UNet last. A compiled graph is guarded by the very objects that it was made with: applying
# the same again takes no new graph if they come back.
_EARLIER: weakref.WeakKeyDictionary[nn.Module, list[StepFollower]] = weakref.WeakKeyDictionary()
_MAX_EARLIER = 8


def _denoiser_of(target: object) -> Any:
    """What a pipeline calls as its UNet; itself where ``target`` is no pipeline."""
    return getattr(target, "unet", target)


def _unet_of(target: object) -> UNet2DConditionModel:
    unet = _denoiser_of(target)
    unet = getattr(unet, "_orig_mod", unet)  # what torch.compile wraps
    if not isinstance(unet, UNet2DConditionModel):
        raise TypeError(
            f"pipe is a {type(target).__name__} with the denoiser {type(unet).__name__}; "
            "expected a pipeline with a UNet2DConditionModel as its unet, or that UNet itself"
        )
    return unet


def _follower(unet: nn.Module) -> StepFollower | None:
    """The hook that holds all there is to know about what was applied; None where nothing was."""
    return next((hook for hook in unet._forward_pre_hooks.values() if isinstance(hook, StepFollower)), None)


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
    for key in [key for key, hook in unet._forward_pre_hooks.items() if isinstance(hook, StepFollower)]:
        follower = unet._forward_pre_hooks.pop(key)
        unet._forward_pre_hooks_with_kwargs.pop(key, None)
        follower.stop_following()
        _EARLIER.setdefault(unet, []).append(follower)
        del _EARLIER[unet][:-_MAX_EARLIER]


def _install(target: nn.Module, unet: nn.Module, follower: StepFollower) -> None:
    """``target``: the UNet, or what ``torch.compile`` has wrapped around it."""
    if follower in _EARLIER.get(unet, []):
        _EARLIER[unet].remove(follower)
    for patch in follower.patches:
        patch.install()
    unet.register_forward_pre_hook(follower, with_kwargs=True)
    follower.follow_outside(target, unet)


def _follower_of(unet: nn.Module, blocks: list[AttentionBlock], options: Options) -> StepFollower:
    """One that was removed, where the same was applied before: its graphs serve again. Else a new one."""
    for follower in _EARLIER.get(unet, []):
        same_blocks = [patch.module for patch in follower.patches] == [block.module for block in blocks]
        if follower.state.options == options and same_blocks:
            return follower
    state = PruningState(options)
    patches = [PrunedForward(block.name, block.module, block.level, block.whole_when_light, state) for block in blocks]
    return StepFollower(state, patches)


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
        reason = why_not_prunable(block.module, options.ratio_at(block.level), _is_ours(block.module))
        if reason is not None:
            raise ValueError(f"{block.name} cannot be pruned: {reason}")
    if options.placement == "paper":
        # Pruned after their only layer, such blocks would have nothing left to save.
        chosen = [block for block in chosen if len(block.module.transformer_blocks) > 1]
    if options.schedule is not None and options.schedule.constant_phase:
        chosen = [block for block in chosen if not block.whole_when_light]
    if not chosen:
        raise ValueError(
            f"no attention block is left to prune with ratio={options.ratio}, levels={options.levels}, "
            f"schedule={options.schedule} and placement={options.placement!r}; "
            f"expected some of the levels {available} with"
            + (" more than one layer" if options.placement == "paper" else " attention")
        )
    return chosen


def _is_ours(module: nn.Module) -> bool:
    return isinstance(module.__dict__.get("forward"), PrunedForward)


def apply(
    pipe: Pipeline, options: Options | str | None = None, *, scheduler: object | None = None, **changes: Any
) -> Pipeline:
    """Prune the tokens of a Stable Diffusion XL pipeline's UNet from now on (AT-EDM); inference only.

    The modules stay the ones that they were: each attention block gets a ``forward`` of its own until
    :func:`remove`. Applying again replaces the earlier settings. If anything is wrong, nothing is changed.

    Args:
        pipe: a diffusers pipeline with a ``UNet2DConditionModel``, or such a UNet; compiled ones too.
        options: all of what follows but ``scheduler``, as an :class:`atedm.Options`, or the name of a preset in
            ``atedm.PRESETS``. Keywords change single ones of it.
        ratio: the part of the tokens to drop, from 0 up to 1, or a mapping from level to that part (levels that it
            does not name stay whole). Default 0.63, the paper's main setting. 0 drops none, to compare with: the
            pictures are the same bit for bit, and it goes on UNets that cannot be pruned too.
        levels: resolution levels to prune, from 1 at the latent's own resolution; SDXL has attention at 2 and 3.
            Default: all. ``(3,)`` is the paper's AT-EDM†.
        schedule: an :class:`atedm.DSAP` (default: the paper's, light for the first 0.3 of the steps), or None to
            prune everywhere at every step.
        placement: ``"early"`` prunes right after the first layer's self-attention and recovers after the output
            projection; ``"paper"`` prunes after that layer and recovers before the projection. The result is the same
            up to rounding; early does less work.
        ranking: what the kept tokens are chosen by. ``"self"``: PageRank on self-attention (the paper's), ``"cross"``:
            on cross-attention; ``"keys"``: those first whose keys are least like all the others' (ours); or a function
            from ``q, k [B, H, N, D]`` and ``lse [B, H, N]`` of the first self-attention to scores ``[B, H', N]``
            (float32, not negative).
        recovery: what a dropped token gets. ``"similarity"``: a copy of the kept token that it attends to most (the
            paper's); ``"keys"``: of the one with the most similar keys (ours); ``"zeros"`` or ``"bicubic"``.
        grid: keep the tokens at the crossings of every ``grid``-th row and column before all others, so that some are
            kept everywhere; a coarser grid where not so many are kept. None, the default, for none.
        rank_every: choose tokens at every such denoising step, and keep the choice for the steps between. Default 1.
        share_guidance: choose tokens once for both halves of classifier-free guidance, from the conditional half, which
            is the batch's second; in a pipeline without guidance it does nothing. Pipelines that guide by three parts
            (perturbed attention, InstructPix2Pix) are refused. Default False.
        reduction: how heads are joined, ``"rms"`` or ``"mean"``.
        keep_multiple: round the number of kept tokens to a multiple of this.
        max_iterations, tolerance: of the power iteration, see :func:`atedm_kernels.weighted_page_rank`.
        scheduler: whose steps ``schedule`` and ``rank_every`` follow when ``pipe`` is a UNet. A pipeline that runs has
            its own followed, be it ``pipe`` or another with the same UNet; without either, the step is judged by the
            timestep's value.

    Returns:
        ``pipe``.

    Raises:
        TypeError, ValueError: an argument that does not fit, a UNet with nothing to prune, or one with a module that
            cannot be pruned; the message says which.
    """
    unet = _unet_of(pipe)
    settings = resolve(options, changes)
    if scheduler is not None and not hasattr(scheduler, "timesteps"):
        raise TypeError(f"scheduler is {scheduler!r}; expected a diffusers scheduler, which has timesteps")
    blocks = _blocks_to_prune(unet, settings)
    pipeline = weakref.ref(pipe) if hasattr(pipe, "scheduler") else None
    if pipeline is not None and scheduler is not None:
        raise ValueError("scheduler is given with a pipeline; expected None: the pipeline's own scheduler is followed")
    if pipeline is not None and settings.share_guidance:
        check_halves(pipe)
    earlier = _state_of(unet)
    # An open recording goes on.
    recordings, call = ([], -1) if earlier is None else (earlier.recordings, earlier.call)
    _uninstall(unet)
    follower = _follower_of(unet, blocks, settings)
    follower.state.begin(scheduler if pipeline is None else pipe.scheduler, pipeline)
    follower.state.recordings, follower.state.call = recordings, call
    _install(_denoiser_of(pipe), unet, follower)
    logger.info("pruning %d of %d attention blocks", len(blocks), len(attention_blocks(unet)))
    return pipe


def remove(pipe: Pipeline) -> Pipeline:
    """Take pruning out again; the UNet is exactly what it was. Does nothing where nothing was applied.

    Raises:
        TypeError: ``pipe`` is neither a pipeline with a ``UNet2DConditionModel`` nor such a UNet.
        RuntimeError: another tool has wrapped a pruned block since; nothing is changed.
    """
    unet = _unet_of(pipe)
    state = _state_of(unet)
    if state is not None and state.recordings:
        logger.warning("removed while it is recorded: nothing more is recorded here")
    _uninstall(unet)
    return pipe


@contextlib.contextmanager
def applied(
    pipe: Pipeline, options: Options | str | None = None, *, scheduler: object | None = None, **changes: Any
) -> Iterator[Pipeline]:
    """:func:`apply` for the length of a ``with`` block; afterwards what was in force before it is again."""
    unet = _unet_of(pipe)
    earlier = _follower(unet)
    before = None if earlier is None else dict(vars(earlier.state))
    apply(pipe, options, scheduler=scheduler, **changes)
    try:
        yield pipe
    finally:
        _uninstall(unet)
        if earlier is not None:
            vars(earlier.state).update(before)
            _install(_denoiser_of(pipe), unet, earlier)


def pruned_blocks(pipe: object) -> list[str]:
    """Module paths of the attention blocks that :func:`apply` prunes, in the order in which they run."""
    return [patch.name for patch in _patches(_unet_of(pipe))]


@contextlib.contextmanager
def record(pipe: object) -> Iterator[Recording]:
    """Collect scores, kept tokens and iterations of every block and step while the ``with`` block runs.

    Copies each kept set to the CPU, so it slows a GPU down, and runs a compiled UNet uncompiled: for looking, not for
    timing.

    Raises:
        ValueError: nothing is applied to ``pipe``.
    """
    unet = _unet_of(pipe)
    state = _state_of(unet)
    if state is None:
        raise ValueError("pipe is not pruned; expected one that atedm.apply has been called on")
    pruned = set(pruned_blocks(pipe))
    recording = Recording([(block.name, block.level, block.name in pruned) for block in attention_blocks(unet)])
    recordings = state.recordings
    recordings.append(recording)
    state.call = -1
    try:
        # In a graph, what happens once is all that would be noted.
        with torch.compiler.set_stance("force_eager"):
            yield recording
    finally:
        # In place: applying again inside the block has handed the list on.
        recordings[:] = [other for other in recordings if other is not recording]
