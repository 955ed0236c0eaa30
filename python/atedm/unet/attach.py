"""Apply pruning to a diffusers pipeline and remove it again."""

from __future__ import annotations

import contextlib
import logging
import weakref
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import nn

from atedm.policy.options import Options, resolve
from atedm.unet.blocks import attention_blocks, unwrapped
from atedm.unet.calls import Following, UNetCalls
from atedm.unet.installing import calls_of, install, make_calls, parts_on, uninstall
from atedm.unet.prunable import blocks_to_prune
from atedm.unet.recording import Recording
from atedm.unet.reuse import why_not_reusable

logger = logging.getLogger("atedm")

Pipeline = TypeVar("Pipeline")


def _denoiser_of(target: object) -> Any:
    """The object that a pipeline calls as its UNet; ``target`` itself if it is not a pipeline."""
    return getattr(target, "unet", target)


def _unet_of(target: object) -> UNet2DConditionModel:
    unet = unwrapped(_denoiser_of(target))
    if not isinstance(unet, UNet2DConditionModel):
        raise TypeError(
            f"pipe is a {type(target).__name__} with the denoiser {type(unet).__name__}; "
            "expected a pipeline with a UNet2DConditionModel as its unet, or that UNet itself"
        )
    return unet


def apply(
    pipe: Pipeline, options: Options | str | None = None, *, scheduler: object | None = None, **changes: Any
) -> Pipeline:
    """Make a Stable Diffusion XL pipeline's UNet compute less from now on (AT-EDM, with extensions).

    By default some steps reuse deep features. From 30 % of the run on, every other computed step prunes tokens, chosen
    by PageRank and drift; a dropped token keeps its last update. The preset ``"paper"`` is the published method.

    No module is replaced: until :func:`remove`, attention blocks and stages of the UNet have a ``forward`` of atedm's.
    Applying again replaces the earlier settings. If ``apply`` raises, nothing has changed.

    Gradients flow through a pruned call, but not through the choice of tokens. A call that records gradients is whole
    if the settings need what an earlier call computed, as the default settings do. Train with ``"paper"``, which
    remembers nothing.

    Args:
        pipe: a diffusers pipeline with a ``UNet2DConditionModel``, or that UNet itself; either may be compiled.
        options: all of the settings below except ``scheduler``, as an :class:`atedm.Options`, or the name of a preset
            in ``atedm.PRESETS``. Keywords change single options.
        ratio: the fraction of the tokens to drop, from 0 up to, not including, 1, or a mapping from level to fraction
            (levels that it does not name stay whole). Default 0.63, the paper's main setting. 0 drops none, for
            comparison: under the default schedule the pictures then equal the full UNet's bit for bit, even on UNets
            that cannot be pruned.
        levels: resolution levels to prune, counted from 1 at the latent's own resolution; SDXL has attention at 2 and
            3. Default: all. ``(3,)`` is the paper's AT-EDM†, the preset ``"paper-dagger"``.
        schedule: the kind of each denoising step, see :mod:`atedm.policy.schedule`: an :class:`atedm.Adaptive`
            (default: tolerance 0.27, and from 0.3 of the run on every other computed step is pruned),
            :class:`atedm.Every`, the paper's :class:`atedm.DSAP`, another :class:`atedm.Schedule`, a list with one kind
            for each step, or None to prune everywhere at every step. If a step needs what an earlier one computed, the
            first step of a picture is whole.
        placement: ``"early"`` prunes right after the first layer's self-attention and recovers after the output
            projection; ``"paper"`` prunes after that layer and recovers before the projection. The results are equal
            up to rounding; early does less work.
        ranking: how the kept tokens are chosen. ``"self"``: by PageRank on self-attention (the paper's, default);
            ``"cross"``: by PageRank on cross-attention; ``"keys"``: first the tokens whose keys are least like all
            others' (ours); a function from ``q, k [B, H, N, D]`` and ``lse [B, H, N]`` of the first self-attention
            to scores ``[B, H', N]`` (float32, not negative); or None, to choose by ``staleness`` only, before
            self-attention.
        staleness: the factor that multiplies the ranking's scores (ours). ``"drift"``: how far the input of a token
            has moved since the token was last computed (default); ``"steps"``: how many calls ago that was; None for
            no factor.
        recovery: what a dropped token gets. ``"cached"``: what the block added to it when it was last computed (ours,
            default); ``"similarity"``: a copy of the kept token that attends to it most (the paper's); ``"keys"``: a
            copy of the kept token with the most similar keys (ours); ``"zeros"`` or ``"bicubic"``.
        grid: keep the tokens at the crossings of every ``grid``-th row and column before all others, so that some are
            kept everywhere. If fewer tokens are kept than the grid has crossings, the grid gets coarser. Default None:
            no grid.
        rank_every: choose tokens at every ``rank_every``-th denoising step and keep the choice in between. Default 1.
        reduction: how heads are joined, ``"rms"`` or ``"mean"``.
        keep_multiple: round the number of kept tokens to a multiple of this.
        max_iterations, tolerance: of the power iteration, see :func:`atedm_kernels.weighted_page_rank`.
        warm_start: start the power iteration from the block's scores of an earlier step of the picture, and then do at
            most 3 iterations (ours, default). False starts from uniform scores, as published.
        scheduler: needed only if ``pipe`` is a UNet that you call with plain timestep values: its ``timesteps`` tell
            the step. Pipelines need none: they hand the UNet elements of their scheduler's timesteps, and the position
            of an element is the step. Without either, the schedule judges by the timestep's value.

    Returns:
        ``pipe``.

    Raises:
        TypeError, ValueError: an argument is invalid, or the UNet has nothing to prune or a module that cannot be
            pruned; the message says which.
    """
    unet = _unet_of(pipe)
    settings = resolve(options, changes)
    if scheduler is not None and not hasattr(scheduler, "timesteps"):
        raise TypeError(f"scheduler is {scheduler!r}; expected a diffusers scheduler, which has timesteps")
    if scheduler is not None and hasattr(pipe, "scheduler"):
        raise ValueError("scheduler is given with a pipeline; expected None: atedm follows the pipeline's own")
    reason = why_not_reusable(unet) if "reused" in settings.steps.kinds else None
    if reason is not None:
        raise ValueError(
            f"the UNet's features cannot be reused: {reason}; expected a schedule without 'reused' steps, such as "
            "schedule=None or the preset 'paper'"
        )
    blocks = blocks_to_prune(unet, settings, lambda module: bool(parts_on(module)))
    earlier = calls_of(unet)
    recordings = [] if earlier is None else earlier.recordings  # an open recording continues
    uninstall(unet)
    calls = make_calls(unet, blocks, settings)
    calls.begin(scheduler)
    calls.recordings = recordings
    install(_denoiser_of(pipe), unet, calls)
    logger.info("pruning %d of %d attention blocks", len(blocks), len(attention_blocks(unet)))
    return pipe


def remove(pipe: Pipeline) -> Pipeline:
    """Remove pruning and restore the UNet exactly. Does nothing if nothing was applied.

    Raises:
        TypeError: ``pipe`` is neither a pipeline with a ``UNet2DConditionModel`` nor that UNet itself.
        RuntimeError: another tool has wrapped a pruned block since ``apply``; nothing is changed.
    """
    unet = _unet_of(pipe)
    calls = calls_of(unet)
    if calls is not None and calls.recordings:
        logger.warning("atedm was removed during a recording, which ends here")
    uninstall(unet)
    return pipe


@contextlib.contextmanager
def applied(
    pipe: Pipeline, options: Options | str | None = None, *, scheduler: object | None = None, **changes: Any
) -> Iterator[Pipeline]:
    """:func:`apply` for the length of a ``with`` block; afterwards the earlier settings are active again.

    Blocks may end in any order; the settings of the innermost block still open are active.

    Raises:
        RuntimeError: another task or thread is inside ``applied`` for the same UNet, so one of the two would run with
            the other's settings.
    """
    unet = _unet_of(pipe)
    scopes = _SCOPES.setdefault(unet, [])
    if scopes and scopes[-1] not in _entered.get():
        raise RuntimeError(
            "pipe is inside atedm.applied of another task or thread; expected one at a time: give each its own UNet, "
            "or apply the settings once around all of them"
        )
    scope = _Scope(_set_aside(unet))
    apply(pipe, options, scheduler=scheduler, **changes)
    scopes.append(scope)
    _entered.set((*_entered.get(), scope))
    try:
        yield pipe
    finally:
        _entered.set(tuple(other for other in _entered.get() if other is not scope))
        position = scopes.index(scope)
        del scopes[position]
        if position == len(scopes):
            uninstall(unet)
            scope.restore(unet)
        else:
            scopes[position].before = scope.before  # the next scope restores what this one would have restored


@dataclass(eq=False)
class _Scope:
    """An open block of :func:`applied`. ``before``: what was active before it, with its state."""

    before: tuple[UNetCalls, dict[str, Any]] | None

    def restore(self, unet: nn.Module) -> None:
        if self.before is not None:
            calls, state = self.before
            vars(calls).update(state)
            target = calls.following.target
            install(unet if target is None else target, unet, calls)


# The open scopes of each UNet, innermost last, and the scopes that this task or thread is inside.
_SCOPES: weakref.WeakKeyDictionary[nn.Module, list[_Scope]] = weakref.WeakKeyDictionary()
_entered: ContextVar[tuple[_Scope, ...]] = ContextVar("atedm_scopes", default=())


def _set_aside(unet: nn.Module) -> tuple[UNetCalls, dict[str, Any]] | None:
    """What is active, with the state that uninstalling it clears."""
    calls = calls_of(unet)
    return None if calls is None else (calls, {**vars(calls), "following": Following(calls.following.target)})


def pruned_blocks(pipe: object) -> list[str]:
    """Module paths of the attention blocks that :func:`apply` has pruned, in the order in which they run."""
    calls = calls_of(_unet_of(pipe))
    return [] if calls is None else [block.name for block in calls.parts.blocks]


# The number of open recordings, and the stance that makes compiled UNets run uncompiled meanwhile. All recordings share
# one stance, because they may end in any order.
_open_recordings = 0
_stance = contextlib.ExitStack()


@contextlib.contextmanager
def _uncompiled() -> Iterator[None]:
    global _open_recordings
    if _open_recordings == 0:
        _stance.enter_context(torch.compiler.set_stance("force_eager"))
    _open_recordings += 1
    try:
        yield
    finally:
        _open_recordings -= 1
        if _open_recordings == 0:
            _stance.close()


@contextlib.contextmanager
def record(pipe: object, *, tokens: bool = True) -> Iterator[Recording]:
    """In a ``with`` block, collect the kind of each step and the scores, kept tokens and iterations of every block.

    Args:
        tokens: copy each kept set to the CPU, which slows a GPU down, and run a compiled UNet uncompiled. Use this to
            inspect, not to time. False notes only steps, kinds and memory, at no cost.

    Raises:
        ValueError: nothing is applied to ``pipe``.
    """
    unet = _unet_of(pipe)
    calls = calls_of(unet)
    if calls is None:
        raise ValueError("pipe is not pruned; expected one that atedm.apply has been called on")
    pruned = set(pruned_blocks(pipe))
    blocks = [(block.name, block.level, block.name in pruned) for block in attention_blocks(unet)]
    recording = Recording(blocks, tokens=tokens)
    recordings = calls.recordings
    recordings.append(recording)
    try:
        # A graph would record only once, while torch traces it.
        with _uncompiled() if tokens else contextlib.nullcontext():
            yield recording
    finally:
        # In place: applying again inside the block passes on this very list.
        recordings[:] = [other for other in recordings if other is not recording]
