"""The parts of a UNet whose forwards are atedm's."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from atedm.policy.options import Options
from atedm.unet.blocks import feature_map_size
from atedm.unet.graphs import compiled_parts
from atedm.unet.memory import Slot
from atedm.unet.unchanged import Watch

if TYPE_CHECKING:
    from atedm.unet.block import PrunedBlock
    from atedm.unet.reuse import UNetStage


class Parts:
    """What is applied to one UNet, module by module.

    Attributes:
        blocks: the pruned attention blocks, in the order in which they run. stages: the stages, if a step can reuse
            features; else empty.
    """

    def __init__(self, options: Options) -> None:
        self.blocks: list[PrunedBlock] = []
        self.stages: list[UNetStage] = []
        self._options = options
        self.begin()

    def begin(self) -> None:
        """Reset to the state before the first call."""
        self._watch = Watch()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_watch": Watch()}

    def __iter__(self) -> Iterator[PrunedBlock | UNetStage]:
        yield from self.blocks
        yield from self.stages

    @property
    def compiled(self) -> list[nn.Module]:
        """The modules that were compiled one by one, among the parts and the modules around them."""
        return compiled_parts(part.place for part in self)

    def check_unchanged(self) -> None:
        """Refuse changes by other tools since :func:`atedm.apply`, which would refuse them too."""
        self._watch.look((block for block in self.blocks if self._options.ratio_at(block.level) > 0), self.stages)

    def count_kept(self, height: int, width: int) -> None:
        """Warn of blocks that prune nothing at this size of the latent, because a graph itself cannot warn."""
        for block in self.blocks:
            block.count_kept(*feature_map_size(block.level, height, width))

    def start(self, slot: Slot, sample: Tensor, dtype: torch.dtype) -> None:
        """Make room in ``slot`` for what the parts remember of a picture."""
        for part in self:
            part.start(slot, sample, dtype)
