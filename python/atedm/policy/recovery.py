"""What a dropped token gets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

import atedm_kernels as kernels
from atedm.policy.attention_map import AttentionMap


@dataclass(frozen=True)
class Refill:
    """The source of each token of a feature map of ``height`` × ``width``.

    Attributes:
        index: int64 ``[B, K]``, the kept tokens. source: int64 ``[B, N]``, a slot of the compact tensor for each
            position; None if the recovery copies no token. update: ``[B, N, C]``, what the block last added to each
            token; None if that is not remembered.
    """

    index: Tensor
    height: int
    width: int
    source: Tensor | None = None
    update: Tensor | None = None


class Recovery(Protocol):
    """Makes all tokens from the kept ones.

    Attributes:
        reads_attention: whether ``source`` reads the attention of the tokens, and not only their keys.
        remembers: whether it needs what the block added to the tokens when they were last computed.
        gives: what a dropped token gets, in words.
    """

    reads_attention: ClassVar[bool]
    remembers: ClassVar[bool]
    gives: ClassVar[str]

    def source(self, attention: AttentionMap, index: Tensor) -> Tensor | None:
        """Slots ``[B, N]`` of the compact tensor, one for each position; None if no token is copied."""
        ...

    def before_projection(self, x: Tensor) -> Tensor:
        """The compact tensor ``[B, K, C]``, with anything else that must go through the block's output projection."""
        ...

    def tokens(self, x: Tensor, refill: Refill) -> Tensor:
        """``[B, K, C]`` → ``[B, N, C]``."""
        ...

    def feature_map(self, x: Tensor, refill: Refill, residual: Tensor) -> Tensor:
        """``residual`` ``[B, C, h, w]`` with the recovered tokens added."""
        ...


class _Copy:
    """Recovers dropped tokens by copying kept ones, in one pass that also adds the residual."""

    reads_attention: ClassVar[bool] = False
    remembers: ClassVar[bool] = False

    def before_projection(self, x: Tensor) -> Tensor:
        return x

    def tokens(self, x: Tensor, refill: Refill) -> Tensor:
        return kernels.recover_tokens(x, refill.source)

    def feature_map(self, x: Tensor, refill: Refill, residual: Tensor) -> Tensor:
        return kernels.recover_feature_map(x, refill.source, residual)


class SimilarityCopy(_Copy):
    """Copies the kept token that attends to the dropped one most, averaged over the heads (AT-EDM, section 3.3)."""

    reads_attention: ClassVar[bool] = True
    gives: ClassVar[str] = "a copy of the kept token that attends to it most"

    def source(self, attention: AttentionMap, index: Tensor) -> Tensor:
        return kernels.similarity_source(attention.q, attention.k, attention.lse, index, scale=attention.scale)


class KeyCopy(_Copy):
    """Copies the kept token whose keys are most like those of the dropped one (ours); ties go to the lowest slot."""

    gives: ClassVar[str] = "a copy of the kept token with the most similar keys"

    def source(self, attention: AttentionMap, index: Tensor) -> Tensor:
        keys = attention.of_unit_keys()
        return kernels.similarity_source(keys.q, keys.k, keys.lse, index, scale=keys.scale)


class Zeros(_Copy):
    """Fills with zeros, by copying an additional token of zeros in slot ``K`` (AT-EDM, ablation)."""

    gives: ClassVar[str] = "nothing"

    def source(self, attention: AttentionMap, index: Tensor) -> Tensor:
        return sources_or_zero(index, attention.k.shape[2])

    def before_projection(self, x: Tensor) -> Tensor:
        return F.pad(x, (0, 0, 0, 1))


class Bicubic:
    """Interpolates between the kept tokens around a dropped one (AT-EDM, ablation)."""

    reads_attention: ClassVar[bool] = False
    remembers: ClassVar[bool] = False
    gives: ClassVar[str] = "an interpolation of the kept tokens around it"

    def source(self, attention: AttentionMap, index: Tensor) -> None:
        return None

    def before_projection(self, x: Tensor) -> Tensor:
        return x

    def tokens(self, x: Tensor, refill: Refill) -> Tensor:
        return interpolate_bicubic(x, refill.index, refill.height, refill.width)

    def feature_map(self, x: Tensor, refill: Refill, residual: Tensor) -> Tensor:
        recovered = self.tokens(x, refill)
        return residual + recovered.transpose(1, 2).unflatten(2, (refill.height, refill.width))


class Cached:
    """Gives a dropped token its own last update (ours): what the block added to it in the call that last computed it.

    Kept tokens replace their updates. Nothing is copied between tokens.
    """

    reads_attention: ClassVar[bool] = False
    remembers: ClassVar[bool] = True
    gives: ClassVar[str] = "what the block added to it when it was last computed"

    def source(self, attention: AttentionMap, index: Tensor) -> None:
        return None

    def before_projection(self, x: Tensor) -> Tensor:
        return x

    def tokens(self, x: Tensor, refill: Refill) -> Tensor:
        raise NotImplementedError("an update is known only after the output projection")

    def feature_map(self, x: Tensor, refill: Refill, residual: Tensor) -> Tensor:
        return kernels.update_feature_map(x.to(refill.update.dtype), refill.index, refill.update, residual)


# By the name that atedm.apply takes.
RECOVERIES: dict[str, Recovery] = {
    "similarity": SimilarityCopy(),
    "cached": Cached(),
    "keys": KeyCopy(),
    "zeros": Zeros(),
    "bicubic": Bicubic(),
}


def sources_or_zero(index: Tensor, tokens: int) -> Tensor:
    """A source map for padding with zeros: each kept token has its own slot, all others slot ``K``, a token of zeros.

    Args:
        index: int64 ``[B, K]``, the kept tokens.

    Returns:
        int64 ``[B, tokens]``.
    """
    batch, keep = index.shape
    slots = torch.arange(keep, device=index.device).expand(batch, -1)
    return torch.full((batch, tokens), keep, device=index.device).scatter(1, index, slots)


def interpolate_bicubic(x: Tensor, index: Tensor, height: int, width: int) -> Tensor:
    """Fill dropped tokens bicubically from the kept ones around them: ``[B, K, C]`` → ``[B, height · width, C]``.

    Kept tokens can be anywhere. They are averaged into a grid of half the size, then of a quarter, and so on. Each
    coarser grid, resized bicubically, fills the empty cells of the finer one.
    """
    # Computed in float32, because repeated averaging would accumulate the rounding errors of 16 bits.
    dtype = torch.promote_types(x.dtype, torch.float32)
    marks = x.new_ones(*x.shape[:2], 1, dtype=dtype)

    def on_the_map(tokens: Tensor) -> Tensor:
        full = tokens.new_zeros(tokens.shape[0], height * width, tokens.shape[2])
        full = full.scatter(1, index[..., None].expand_as(tokens), tokens)
        return full.transpose(1, 2).unflatten(2, (height, width))

    filled = _fill(on_the_map(x.to(dtype)), on_the_map(marks))
    return filled.flatten(2).transpose(1, 2).to(x.dtype)


def _fill(values: Tensor, weight: Tensor) -> Tensor:
    """Fill the positions of ``values`` ``[B, C, h, w]`` whose ``weight`` ``[B, 1, h, w]`` is 0; these are zeros."""
    height, width = values.shape[-2:]
    if height == 1 and width == 1:
        return values
    count = _sums_of_cells(weight)
    mean = _sums_of_cells(values) / count.clamp(min=1)
    coarse = _fill(mean, (count > 0).to(values.dtype))
    resized = F.interpolate(coarse, size=(height, width), mode="bicubic", align_corners=False)
    return torch.where(weight > 0, values, resized)


def _sums_of_cells(x: Tensor) -> Tensor:
    """Sums over 2 × 2 positions, fewer at the lower and right edge. Pooling would keep ``x`` for its gradient."""
    height, width = x.shape[-2:]
    x = F.pad(x, (0, width % 2, 0, height % 2))
    return x.unflatten(3, (-1, 2)).unflatten(2, (-1, 2)).sum((3, 5))
