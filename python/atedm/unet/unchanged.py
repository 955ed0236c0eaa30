"""What other tools have done to a pruned UNet since :func:`atedm.apply`: looked for before every call.

The look is the UNet's, not its blocks': blocks may be compiled, and a graph looks at nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

from torch import nn

from atedm.unet.blocks import PARTS, why_hooked, why_not_plain, why_not_tokenwise

# Where tools leave what they put in a module's place. Of `why_not_plain`, what is no part of an attention.
_ATTRIBUTES = ("forward", "_old_forward", "_diffusers_hook", "processor")
_PLAIN = ("residual_connection", "rescale_output_factor", "is_cross_attention")


class Block(Protocol):
    """A pruned attention block: its name, and the module."""

    name: str
    module: nn.Module


class Watch:
    """Refuses attention blocks that were changed so that they can no longer be pruned.

    A UNet of SDXL's has 280 modules to look at. So a look compares the objects that these hold with those that were
    there when they were checked, and checks a block where one is another.
    """

    def __init__(self) -> None:
        self._checked: dict[str, list[Any]] = {}

    def look(self, blocks: Iterable[Block]) -> None:
        """
        Raises:
            ValueError: one of ``blocks`` can no longer be pruned.
        """
        for block in blocks:
            held = _held(block.module)
            if held != self._checked.get(block.name):
                _check(block)
                self._checked[block.name] = held


def _check(block: Block) -> None:
    first = next(iter(block.module.transformer_blocks), None)
    reason = "it has no layers" if first is None else why_not_tokenwise(block.module)
    reason = reason or why_hooked(first) or why_not_plain(first.attn1)
    if reason is not None:
        raise ValueError(f"{block.name} can no longer be pruned: {reason}; undo that, or call atedm.remove first")


def _held(module: nn.Module) -> list[Any]:
    """The objects that decide what the check of an attention block finds.

    Read from dictionaries: a module looks in three places for an attribute, which takes ten times as long.
    """
    layers = [*module.transformer_blocks]
    parts = [part for layer in layers for part in map(_children(layer).get, PARTS)]
    found = [vars(part) for part in (*layers, *parts) if part is not None]
    held: list[Any] = [*map(type, layers), *layers, *parts]
    for name in _ATTRIBUTES:
        held += [attributes.get(name) for attributes in found]
    held += [_children(part).get("processor") for part in parts if part is not None]  # those that have weights
    held += [tuple(hook.hooks) for hook in (attributes.get("_diffusers_hook") for attributes in found) if hook]
    for part in (*layers[:1], *parts[:1]):
        if part is not None:
            held += [len(part._forward_hooks), len(part._forward_pre_hooks)]
            held += [*map(_children(part).get, ("group_norm", "spatial_norm")), *map(vars(part).get, _PLAIN)]
    return held


def _children(module: Any) -> dict[str, Any]:
    return getattr(module, "_modules", {})
