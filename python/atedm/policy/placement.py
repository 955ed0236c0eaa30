"""Where in an attention block tokens are dropped and recovered."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Placement:
    """
    Attributes:
        is_early: tokens are dropped right after the first layer's self-attention and recovered after the output
            projection; else after that layer, and before the projection, as published.
        min_layers: in a block with fewer, nothing is left to save.
    """

    is_early: bool
    min_layers: int


# By the name that atedm.apply takes. All that follows the self-attention treats each token on its own, so both come to
# the same, up to rounding.
PLACEMENTS = {
    "early": Placement(is_early=True, min_layers=1),
    "paper": Placement(is_early=False, min_layers=2),
}
