"""Find the attention blocks of a diffusers UNet and their places in it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import nn


@dataclass(frozen=True)
class AttentionBlock:
    """One ``Transformer2DModel`` of a UNet.

    Attributes:
        name: module path in the UNet, such as ``"down_blocks.1.attentions.0"``.
        level: the paper's resolution level, counted from 1 at the latent's own resolution.
        whole_when_light: whether DSAP leaves it unpruned in the light phase.
    """

    name: str
    module: nn.Module
    level: int
    whole_when_light: bool


@dataclass(frozen=True)
class Place:
    """The place of a module in a UNet.

    Attributes:
        parts: the UNet's direct child modules, by name. path: the names on the way from the UNet to the module.
    """

    parts: Mapping[str, nn.Module | None]
    path: Sequence[str]

    @classmethod
    def of(cls, unet: nn.Module, name: str) -> Place:
        return cls(unet._modules, name.split("."))

    def modules(self) -> Iterator[nn.Module]:
        """The modules on the way, outermost first. A wrapper of ``torch.compile`` is followed by what it wraps."""
        parts = self.parts
        for key in self.path:
            found = parts.get(key)
            if found is None:
                return
            yield found
            if "_orig_mod" in found._modules:
                found = found._modules["_orig_mod"]
                yield found
            parts = found._modules

    def holds(self, module: nn.Module) -> bool:
        """Whether ``module`` is still in this place."""
        *_, last = (None, *self.modules())
        return last is module


def unwrapped(module: nn.Module) -> nn.Module:
    """The module inside ``module`` if that is a wrapper of ``torch.compile``; else ``module`` itself."""
    return getattr(module, "_modules", {}).get("_orig_mod", module)  # a module takes a microsecond to miss it


def attention_blocks(unet: UNet2DConditionModel) -> list[AttentionBlock]:
    """Every attention block of ``unet``, in the order in which they run."""
    return list(_attention_blocks(unet))


def _attention_blocks(unet: UNet2DConditionModel) -> Iterator[AttentionBlock]:
    levels = len(unet.down_blocks)
    for i, stage in enumerate(unet.down_blocks):
        for j, module in enumerate(_attentions_of(stage)):
            yield AttentionBlock(f"down_blocks.{i}.attentions.{j}", module, i + 1, j == 0)
    for j, module in enumerate(_attentions_of(unet.mid_block)):
        yield AttentionBlock(f"mid_block.attentions.{j}", module, levels, False)
    for i, stage in enumerate(unet.up_blocks):
        attentions = _attentions_of(stage)
        for j, module in enumerate(attentions):
            yield AttentionBlock(f"up_blocks.{i}.attentions.{j}", module, levels - i, j == len(attentions) - 1)


def _attentions_of(stage: nn.Module | None) -> list[nn.Module]:
    return [unwrapped(module) for module in getattr(stage, "attentions", None) or ()]


def feature_map_size(level: int, height: int, width: int) -> tuple[int, int]:
    """``(h, w)`` of the feature map at ``level``. Each level halves the size of the level before, rounding up."""
    scale = 2 ** (level - 1)
    return -(-height // scale), -(-width // scale)
