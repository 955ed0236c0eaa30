"""FLOPs of a call of a diffusers UNet, counted exactly on the meta device, without weights or memory.

A multiply-add is two FLOPs, as in AT-EDM's tables. What pruning spends on choosing and refilling tokens ("scoring": the
ranking and the source map) is counted separately from the UNet's own work. Each op of atedm_kernels states its own
FLOPs.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import atedm
from atedm.app.models import meta_unet, unet_inputs
from atedm.policy.options import PUBLISHED, Options
from atedm.policy.recovery import RECOVERIES
from atedm.policy.schedule import DSAP
from atedm.policy.selection import kept_tokens
from atedm.unet.blocks import AttentionBlock, attention_blocks
from atedm.unet.installing import calls_of
from atedm.unet.reuse import stages_of
from atedm_kernels.registry import OPS

# The largest ratio that a budget may lead to. Above it, so few tokens are left that the FLOPs no longer change.
MAX_RATIO = 0.999

# A ratio is refined until the FLOPs are within this fraction of the target: below the second decimal of a TFLOP.
SOLVE_TOLERANCE = 1e-3

# The stage of pruning that each op belongs to, as in AT-EDM's latency table.
STAGES = {
    "attention": ("attention_with_logsumexp",),
    "ranking": ("weighted_page_rank", "weighted_page_rank_cross", "attention_column_sums"),
    "selection": ("select_tokens",),
    "source_map": ("similarity_source",),
    "gather": ("gather_tokens", "_gather_pair"),
    "recovery": ("recover_feature_map", "recover_tokens", "update_feature_map"),
}

# The ops that choose tokens and find what refills the dropped ones.
_SCORING_OPS = tuple(OPS[name].overload.overloadpacket for stage in ("ranking", "source_map") for name in STAGES[stage])


@dataclass(frozen=True)
class Flops:
    """FLOPs of one call.

    Attributes:
        unet: FLOPs of the network itself.
        scoring: FLOPs of choosing tokens and finding what refills them; an upper bound for an iterated ranking. The
            token matching of other methods counts as scoring too.
    """

    unet: int
    scoring: int = 0

    def __add__(self, other: Flops) -> Flops:
        return Flops(self.unet + other.unet, self.scoring + other.scoring)

    def __sub__(self, other: Flops) -> Flops:
        return Flops(self.unet - other.unet, self.scoring - other.scoring)

    @property
    def tflops(self) -> float:
        return self.unet / 1e12

    @property
    def scoring_tflops(self) -> float:
        return self.scoring / 1e12


def count_flops(call: Callable[[], object]) -> Flops:
    """Count the FLOPs of ``call()``, which should compute on meta tensors."""
    with torch.no_grad(), FlopCounterMode(display=False) as mode:
        call()
    total = mode.get_total_flops()
    by_op = mode.get_flop_counts().get("Global", {})
    scoring = sum(by_op.get(op, 0) for op in _SCORING_OPS)
    return Flops(total - scoring, scoring)


class UNetFlops:
    """Counts calls of one UNet for images of one size, pruned in any way. Each distinct count is made once.

    Pruning changes only attention blocks, and FLOPs depend only on shapes. So the UNet is called once, whole. Then one
    block of each kind, pruned and whole, gives the difference of a pruned call.

    Args:
        config: keyword arguments of ``UNet2DConditionModel``, see :func:`atedm.app.models.unet_config`.
        width, height: size of the image in pixels. batch: images per call (classifier-free guidance doubles it).
        tokens: number of text tokens.

    Raises:
        ValueError: the size does not fit the latent.
    """

    def __init__(
        self, config: Mapping[str, Any], *, width: int = 1024, height: int = 1024, batch: int = 1, tokens: int = 77
    ) -> None:
        self.config = config
        self.unet = meta_unet(config)
        self._inputs = unet_inputs(self.unet, width=width, height=height, batch=batch, tokens=tokens)
        self._counted: dict[tuple, Flops] = {}
        # The arguments of each attention block in a call; `full` fills this.
        self._block_inputs: dict[str, tuple[tuple, dict[str, Any]]] = {}

    def call(self, unet: nn.Module, timestep: Tensor | None = None) -> None:
        """Call ``unet``, which is on the meta device, on images of this counter's size."""
        (sample, default, text), kwargs = self._inputs
        unet(sample, default if timestep is None else timestep, text, **kwargs)

    def _count_once(self, key: tuple, count: Callable[[], Flops]) -> Flops:
        if key not in self._counted:
            self._counted[key] = count()
        return self._counted[key]

    def full(self) -> Flops:
        """FLOPs of the unpruned UNet."""
        return self._count_once(("full",), self._count_full)

    def _count_full(self) -> Flops:
        def note(name: str, args: tuple, kwargs: dict[str, Any]) -> None:
            self._block_inputs[name] = (args, kwargs)

        handles = [
            block.module.register_forward_pre_hook(
                lambda module, args, kwargs, name=block.name: note(name, args, kwargs), with_kwargs=True
            )
            for block in attention_blocks(self.unet)
        ]
        try:
            return count_flops(lambda: self.call(self.unet))
        finally:
            for handle in handles:
                handle.remove()

    def pruned(self, ratio: float | Mapping[int, float], *, light: bool = False, **settings: Any) -> Flops:
        """FLOPs of a call pruned by the published method with early placement, changed by ``ratio`` and ``settings``.

        Args:
            light: count the light phase of DSAP instead of the phase that prunes every block.

        Raises:
            ValueError, TypeError: the settings are invalid, as for :func:`atedm.apply`.
        """
        return self.of_kind(replace(PUBLISHED, ratio=ratio, **settings), "light" if light else "pruned")

    def of_kind(self, options: Options, kind: str) -> Flops:
        """FLOPs of a call with ``options`` in a step of ``kind``, see :mod:`atedm.policy.schedule`.

        If the ranking or the recovery is not the paper's, what it adds to the call, or saves, is counted as scoring.
        """
        if kind == "whole" or (options.ratio == 0 and kind != "reused"):  # nothing is pruned, and apply would warn
            return self.full()
        if kind == "reused":
            return self._count_once(("reused",), self._count_reused)
        options = replace(options, schedule=DSAP(1.0 if kind == "light" else 0.0))
        with atedm.applied(self.unet, options):
            pruned = set(atedm.pruned_blocks(self.unet))
        blocks = [block for block in attention_blocks(self.unet) if block.name in pruned]
        found = self.full()
        for block in blocks:
            found -= self._block(block)
        sample = self._inputs[0][0]
        with atedm.applied(self.unet, options), calls_of(self.unet).planner.all_of_kind(kind, sample):
            for block in blocks:
                found += self._block(block, options)
        plain = replace(
            options,
            ranking="self",
            recovery=options.recovery if RECOVERIES[options.recovery].remembers else "similarity",
        )
        if options.ranking is None or plain == options:
            return found
        unet = self.of_kind(plain, kind).unet
        return Flops(unet, found.unet + found.scoring - unet)

    def _count_reused(self) -> Flops:
        """The part of a whole call outside of the stages, and the last layer of the last stage."""
        with torch.no_grad(), FlopCounterMode(display=False) as mode:
            self.call(self.unet)
        by_module = {name: sum(counts.values()) for name, counts in mode.get_flop_counts().items()}
        name = type(self.unet).__name__
        last = self.unet.up_blocks[-1]
        path = f"up_blocks.{len(self.unet.up_blocks) - 1}"
        layer = [f"{path}.resnets.{len(last.resnets) - 1}"]
        if hasattr(last, "attentions"):
            layer.append(f"{path}.attentions.{len(last.attentions) - 1}")
        skipped = sum(by_module.get(f"{name}.{stage}", 0) for stage, _ in stages_of(self.unet))
        return Flops(by_module["Global"] - skipped + sum(by_module[f"{name}.{part}"] for part in layer))

    def blocks(self) -> list[tuple[AttentionBlock, tuple, tuple, dict[str, Any], Flops]]:
        """Every attention block of ``unet``, with its kind, its arguments in a call, and its FLOPs unpruned."""
        self.full()
        return [
            (block, self._kind(block), *self._block_inputs[block.name], self._block(block))
            for block in attention_blocks(self.unet)
            if block.name in self._block_inputs
        ]

    def _kind(self, block: AttentionBlock) -> tuple:
        """The kind of ``block``: blocks of one kind have the same FLOPs."""
        args, _ = self._block_inputs[block.name]
        return tuple(args[0].shape), str(block.module.config)

    def _block(self, block: AttentionBlock, options: Options | None = None) -> Flops:
        """FLOPs of ``block`` in a call: pruned with ``options``, which are active, or whole."""
        args, kwargs = self._block_inputs[block.name]
        kept, how = None, ()
        if options is not None:
            kept = kept_tokens(math.prod(args[0].shape[-2:]), options.ratio_at(block.level), options.keep_multiple)
            is_whole = options.steps.constant == "light" and block.whole_when_light
            how = (is_whole, options.placement, options.ranking, options.recovery, options.staleness)
            how += (options.max_iterations, options.warm_start)
        key = (*self._kind(block), kept, *how)
        return self._count_once(key, lambda: count_flops(lambda: block.module(*args, **kwargs)))

    def average(self, ratio: float | Mapping[int, float], *, steps: int, **settings: Any) -> Flops:
        """Mean FLOPs of a call over a run of ``steps`` steps, pruned as in :meth:`pruned`.

        Raises:
            ValueError: the schedule chooses the kinds as it runs; use :meth:`mean`.
        """
        options = replace(PUBLISHED, ratio=ratio, **settings)
        return self.mean(options, options.kinds_of(steps))

    def mean(self, options: Options, kinds: Sequence[str] | Counter[str]) -> Flops:
        """Mean FLOPs of a call over a run with ``options``. ``kinds``: the kind of each step, or the count of each."""
        return mean_flops(lambda kind: self.of_kind(options, kind), kinds)


def mean_flops(of_kind: Callable[[str], Flops], kinds: Sequence[str] | Counter[str]) -> Flops:
    """Mean FLOPs of calls of these ``kinds``; ``of_kind`` is called once for each kind."""
    counts = Counter(kinds)
    each = [(of_kind(kind), count) for kind, count in counts.items()]
    unet, scoring = (sum(getattr(f, part) * n for f, n in each) / counts.total() for part in ("unet", "scoring"))
    return Flops(round(unet), round(scoring))


def solve_decreasing(
    function: Callable[[float], float], target: float, low: float, high: float, tolerance: float = SOLVE_TOLERANCE
) -> float:
    """The argument between ``low`` and ``high`` at which a decreasing step ``function`` is nearest to ``target``.

    It uses false position (Illinois variant): FLOPs are nearly linear in the ratio, so this needs a third of the counts
    of a bisection. It stops within the relative ``tolerance`` of the target, or when the bracket is too small to
    contain a step.

    Raises:
        ValueError: ``target`` cannot be reached; the message names the range.
    """
    left, right = function(low) - target, function(high) - target
    for argument, gap in ((low, left), (high, right)):
        if abs(gap) <= tolerance * target:
            return argument
    if left < 0 or right > 0:
        raise ValueError(
            f"{target / 1e12:.3f} TFLOPs cannot be reached; expected from {(right + target) / 1e12:.3f} "
            f"(ratio {high:g}) to {(left + target) / 1e12:.3f} (ratio {low:g})"
        )
    best, smallest = (low, left) if left < -right else (high, right)
    kept = 0  # the end that stayed in the last step: if it stays again, its weight is halved
    while high - low > 1e-5:
        middle = high - right * (high - low) / (right - left)
        gap = function(middle) - target
        if abs(gap) < abs(smallest):
            best, smallest = middle, gap
        if abs(gap) <= tolerance * target:
            break
        if gap > 0:
            low, left = middle, gap
            right, kept = (right / 2, 1) if kept == 1 else (right, 1)
        else:
            high, right = middle, gap
            left, kept = (left / 2, -1) if kept == -1 else (left, -1)
    return best
