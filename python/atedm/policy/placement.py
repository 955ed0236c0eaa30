"""The points in an attention block where tokens are dropped and recovered."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Placement:
    """Where tokens are dropped and recovered.

    Attributes:
        is_early: if True, tokens are dropped right after the first layer's self-attention and recovered after the
            output projection; if False, after that layer and before the projection, as published.
        min_layers: in a block with fewer layers, there is nothing to save.
    """

    is_early: bool
    min_layers: int


# By the name that atedm.apply takes. Everything after the self-attention treats each token separately, so both give the
# same result up to rounding.
PLACEMENTS = {
    "early": Placement(is_early=True, min_layers=1),
    "paper": Placement(is_early=False, min_layers=2),
}
