"""FLOPs of a call of a diffusers UNet, counted on the meta device: no weights, no memory, exact.

Two FLOPs a multiply-add, as in AT-EDM's tables. What pruning spends on choosing and refilling tokens ("scoring": the
ranking and the source map) is counted apart from the UNet's own work. Each op of atedm_kernels states its own FLOPs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import atedm
from atedm.app.models import meta_unet, unet_inputs
from atedm.policy.options import Options
from atedm.policy.ranking import RankingFunction
from atedm.policy.selection import kept_tokens
from atedm.unet.blocks import AttentionBlock, attention_blocks
from atedm_kernels.registry import OPS

# What a budget may ask for. Above it so few tokens are left that the FLOPs no longer change.
MAX_RATIO = 0.999

# A ratio is solved for until the FLOPs are as near as this part of the target: below the second decimal of a TFLOP.
SOLVE_TOLERANCE = 1e-3

# The stage of pruning that each op belongs to, as in AT-EDM's latency table.
STAGES = {
    "attention": ("attention_with_logsumexp",),
    "ranking": ("weighted_page_rank", "weighted_page_rank_cross", "attention_column_sums"),
    "selection": ("select_tokens",),
    "source_map": ("similarity_source",),
    "gather": ("gather_tokens",),
    "recovery": ("recover_feature_map", "recover_tokens", "update_feature_map"),
}

# Choosing tokens, and finding what refills them.
_SCORING_OPS = tuple(OPS[name].overload.overloadpacket for stage in ("ranking", "source_map") for name in STAGES[stage])


@dataclass(frozen=True)
class Flops:
    """FLOPs of one call.

    Attributes:
        unet: of the network itself.
        scoring: of choosing tokens and finding what refills them; an upper bound for an iterated ranking. A peer's
            matching of tokens counts as scoring too.
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
    """Counts calls of one UNet for images of one size, pruned in any way; each distinct question once.

    Pruning changes attention blocks alone, and FLOPs depend on shapes alone. So the UNet is called once, whole. Then
    one block of each kind, pruned and whole, tells by what a pruned call differs.

    Args:
        config: keyword arguments of ``UNet2DConditionModel``, see :func:`atedm.app.models.unet_config`.
        width, height: of the image in pixels. batch: images in a call (classifier-free guidance doubles it).
        tokens: of the text.

    Raises:
        ValueError: a size that does not fit the latent.
    """

    def __init__(
        self, config: Mapping[str, Any], *, width: int = 1024, height: int = 1024, batch: int = 1, tokens: int = 77
    ) -> None:
        self.config = config
        self.unet = meta_unet(config)
        self._inputs = unet_inputs(self.unet, width=width, height=height, batch=batch, tokens=tokens)
        self._counted: dict[tuple, Flops] = {}
        # Arguments of each attention block in a call, filled by `full`.
        self._block_inputs: dict[str, tuple[tuple, dict[str, Any]]] = {}

    def call(self, unet: nn.Module) -> None:
        """Call ``unet``, one on the meta device, on images of this counter's size."""
        positional, kwargs = self._inputs
        unet(*positional, **kwargs)

    def _count_once(self, key: tuple, count: Callable[[], Flops]) -> Flops:
        if key not in self._counted:
            self._counted[key] = count()
        return self._counted[key]

    def full(self) -> Flops:
        """FLOPs of the UNet as it is."""
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

    def pruned(
        self,
        ratio: float | Mapping[int, float],
        *,
        levels: tuple[int, ...] | None = None,
        placement: str = "early",
        light: bool = False,
        ranking: str | RankingFunction = "self",
        recovery: str = "similarity",
    ) -> Flops:
        """FLOPs of a call pruned by :func:`atedm.apply` with these settings.

        Args:
            light: count the light phase of DSAP instead of the one that prunes every block.
            ranking, recovery: what another one than the defaults adds to the call, or saves, is counted as scoring.

        Raises:
            ValueError, TypeError: settings that do not fit, as :func:`atedm.apply` raises them.
        """
        if ratio == 0:  # Nothing is pruned, which apply would warn of.
            return self.full()
        settings = {"levels": levels, "placement": placement, "ranking": ranking, "recovery": recovery}
        settings["schedule"] = atedm.DSAP(fraction=1.0) if light else None
        with atedm.applied(self.unet, ratio=ratio, **settings):
            pruned = set(atedm.pruned_blocks(self.unet))
        blocks = [block for block in attention_blocks(self.unet) if block.name in pruned]
        found = self.full()
        for block in blocks:
            found -= self._block(block)
        options = Options(ratio=ratio)
        with atedm.applied(self.unet, ratio=ratio, **settings):
            for block in blocks:
                found += self._block(block, options, light, placement, ranking, recovery)
        if (ranking, recovery) == ("self", "similarity"):
            return found
        unet = self.pruned(ratio, levels=levels, placement=placement, light=light).unet
        return Flops(unet, found.unet + found.scoring - unet)

    def blocks(self) -> list[tuple[AttentionBlock, tuple, tuple, dict[str, Any], Flops]]:
        """Every attention block of ``unet``: its kind, its arguments in a call, and its FLOPs there, whole."""
        self.full()
        return [
            (block, self._kind(block), *self._block_inputs[block.name], self._block(block))
            for block in attention_blocks(self.unet)
            if block.name in self._block_inputs
        ]

    def _kind(self, block: AttentionBlock) -> tuple:
        """Blocks of one kind cost the same."""
        args, _ = self._block_inputs[block.name]
        return tuple(args[0].shape), str(block.module.config)

    def _block(self, block: AttentionBlock, options: Options | None = None, *how: object) -> Flops:
        """FLOPs of ``block`` in a call: pruned by ``options`` and ``how``, which are in force, or whole."""
        args, kwargs = self._block_inputs[block.name]
        kept = None if options is None else kept_tokens(math.prod(args[0].shape[-2:]), options.ratio_at(block.level))
        key = (*self._kind(block), kept, *how)
        return self._count_once(key, lambda: count_flops(lambda: block.module(*args, **kwargs)))

    def average(
        self, ratio: float | Mapping[int, float], *, steps: int, schedule: atedm.DSAP | None = None, **settings: Any
    ) -> Flops:
        """Mean FLOPs of a call over a run of ``steps`` steps with ``schedule`` (default: the paper's DSAP)."""
        light_steps = (schedule or atedm.DSAP()).light_steps(steps)
        light = self.pruned(ratio, light=True, **settings) if light_steps else Flops(0)
        rest = self.pruned(ratio, **settings) if light_steps < steps else Flops(0)
        mean = [
            round((light_steps * a + (steps - light_steps) * b) / steps)
            for a, b in ((light.unet, rest.unet), (light.scoring, rest.scoring))
        ]
        return Flops(*mean)


def solve_decreasing(
    function: Callable[[float], float], target: float, low: float, high: float, tolerance: float = SOLVE_TOLERANCE
) -> float:
    """The argument between ``low`` and ``high`` at which a decreasing step ``function`` comes nearest to ``target``.

    False position (Illinois variant): FLOPs are nearly linear in the ratio, so it needs a third of the counts of a
    bisection. Ends within the relative ``tolerance`` of the target, or where the bracket is too small to hold a step.

    Raises:
        ValueError: ``target`` is out of reach; the message names the range.
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
    kept = 0  # which end stayed in the last step, to halve its weight when it stays again
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
