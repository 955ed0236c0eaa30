"""Look before every call for what other tools have done to a pruned UNet since :func:`atedm.apply`.

The UNet's hook looks, not its blocks, because a compiled block would not look.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import repeat
from typing import TYPE_CHECKING, Any

from diffusers.models.attention import BasicTransformerBlock, FeedForward
from diffusers.models.attention_processor import Attention
from torch import nn

from atedm.unet.blocks import unwrapped
from atedm.unet.other_tools import (
    PARTS,
    parts_of,
    runs_for_another,
    runs_forward,
    runs_its_own_forward,
    why_not_skippable,
    why_stage_replaced,
)
from atedm.unet.prunable import LAYER, METHOD, METHODS, NORMS, PLAIN, why_not_rankable, why_not_tokenwise

if TYPE_CHECKING:
    from atedm.unet.block import PrunedBlock
    from atedm.unet.calls import UNetCalls
    from atedm.unet.reuse import UNetStage


class Watch:
    """Refuses changed blocks that can no longer be pruned, and changed stages whose features can no longer be reused.

    SDXL's UNet has 280 modules to check. To save time, a look compares the objects that matter with those of the last
    check, and checks a block again only if one of them has changed.
    """

    def __init__(self) -> None:
        self._checked: dict[str, tuple[_Places, list[Any]]] = {}

    def look(self, blocks: Iterable[PrunedBlock], stages: Iterable[UNetStage]) -> None:
        """Check ``blocks`` and ``stages``.

        Raises:
            ValueError: a block can no longer be pruned, or the features of a stage can no longer be reused.
        """
        for block in blocks:
            if not block.place.holds(block.module):
                raise ValueError(
                    f"{block.name} can no longer be pruned: another module has taken its place; put it back, or call "
                    "atedm.apply again"
                )
            self._look_at(block.name, block.module, _check, block)
        for stage in stages:
            _check_stage(stage)
            for n, module in enumerate(stage.module._modules.get("attentions") or ()):
                name = f"{stage.name}.attentions.{n}"
                if len(getattr(module, "transformer_blocks", ())) and name not in self._checked:
                    self._look_at(f"{name}, skipped", module, _check_skipped, name, module, stage.calls)

    def _look_at(self, name: str, module: nn.Module, check: Callable[..., None], *arguments: Any) -> None:
        checked = self._checked.get(name)
        if checked is None or checked[0].module is not module or checked[0].read() != checked[1]:
            check(*arguments)
            places = _Places(module)
            self._checked[name] = places, places.read()


def _check_shared(name: str, module: nn.Module, calls: UNetCalls) -> None:
    if runs_for_another(module, calls):
        raise ValueError(
            f"{name} can no longer be used: another UNet shares it and has been pruned since; expected atedm.remove on "
            "that one first"
        )


def _check(block: PrunedBlock) -> None:
    _check_shared(block.name, block.module, block.calls)
    first = next(iter(block.module.transformer_blocks), None)
    reason = "it has no layers" if first is None else why_not_tokenwise(block.module)
    if reason is None and runs_its_own_forward(block.module):
        reason = "its forward is that of its class again"
    if reason is None and not block.is_current:
        reason = "its class, or the forward of its class, has changed since atedm.apply"
    reason = reason or why_not_rankable(first)
    if reason is not None:
        raise ValueError(f"{block.name} can no longer be pruned: {reason}; undo that, or call atedm.remove first")


def _check_skipped(name: str, module: nn.Module, calls: UNetCalls) -> None:
    _check_shared(name, module, calls)
    reason = why_not_skippable(module)
    if reason is not None:
        raise ValueError(
            f"{name} can no longer be left out of reused steps: {reason}; undo that, or call atedm.remove first"
        )


def _check_stage(stage: UNetStage) -> None:
    if not stage.place.holds(stage.module) or not stage.is_current:
        raise ValueError(
            f"the features of {stage.name} can no longer be reused: it or its class has changed since atedm.apply; "
            "undo that, or call atedm.apply again"
        )
    replaced = why_stage_replaced(stage.module)
    name = stage.name if replaced is None else f"{stage.name}.{replaced}"
    if replaced is not None or not runs_forward(stage.module, stage):
        raise ValueError(
            f"the features of {name} can no longer be reused: its forward has been replaced by another tool; "
            "undo that, or call atedm.remove first"
        )


_MISSING = object()  # stands for a place that is empty, where None can be a value


def _places_of(module: nn.Module, name: str) -> list[tuple[dict[str, Any], str]]:
    """Where a module looks for an attribute that may be a module; what is among its own attributes comes first."""
    own = vars(module)
    return [(own, name)] if name in own else [(own, name), (module._modules, name)]


class _Places:
    """The places of the objects that decide the outcome of an attention block's check.

    They are read from dictionaries, because a module looks in three places for an attribute, which takes ten times as
    long.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        layers = [*module.transformer_blocks]
        parts = [part for layer in layers for _, part in parts_of(layer)]
        attentions = [part for part in parts if "processor" in (*vars(part), *part._modules)]
        first = layers[0].attn1
        forwards = [unwrapped(layer.ff) for layer in layers if getattr(layer, "ff", None) is not None]
        objects: list[tuple[dict[str, Any], str]] = [
            (module._modules, "transformer_blocks"),
            *((module.transformer_blocks._modules, str(n)) for n in range(len(layers))),
            *((layer._modules, name) for layer in layers for name in PARTS),
            *((vars(module), name) for name in ("forward", METHOD)),
            *((vars(part), "forward") for part in parts),
            # Under an accelerate hook.
            *((vars(part), "_old_forward") for part in parts if "_old_forward" in vars(part)),
            *(place for part in attentions for place in _places_of(part, "processor")),
            *(place for name in PLAIN for place in _places_of(first, name)),
            *(place for part in attentions for name in NORMS for place in _places_of(part, name)),
            *(place for layer in layers for place in _places_of(layer, "pos_embed")),
            *((vars(layers[0]), name) for name in LAYER),
        ]
        # Read in the order of the dictionaries' addresses, since most are in no cache.
        self._dictionaries, self._names = zip(*sorted(objects, key=lambda place: id(place[0])), strict=True)
        self._typed = [module, *layers, *attentions, *forwards]  # tools replace their classes
        self._kinds = {*map(type, self._typed), BasicTransformerBlock, Attention, FeedForward}  # or the class's forward
        self._attributes = [vars(part) for part in attentions]  # a method that replaces the class's is one more
        self._processors = {type(part.processor) for part in attentions}
        self._sized = [
            (vars(module.transformer_blocks), "_modules"),
            *((vars(part), name) for part in (layers[0], first) for name in ("_forward_hooks", "_forward_pre_hooks")),
            *((vars(vars(part)["_diffusers_hook"]), "hooks") for part in parts if "_diffusers_hook" in vars(part)),
        ]

    def read(self) -> list[Any]:
        found = [*map(dict.get, self._dictionaries, self._names, repeat(_MISSING))]
        found += map(type, self._typed)
        found += [kind.forward for kind in self._kinds]
        found += [kind.__call__ for kind in self._processors]
        found += [getattr(Attention, name) for name in METHODS]
        found += map(len, self._attributes)
        found.append(getattr(type(self._typed[0]), METHOD, None))
        return found + [len(place[name]) for place, name in self._sized]
