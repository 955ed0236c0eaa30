"""How many tokens are kept, and which come before all others."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def kept_tokens(tokens: int, ratio: float, keep_multiple: int = 1) -> int:
    """``(1 − ratio) · tokens`` rounded to a multiple of ``keep_multiple``, between that multiple and ``tokens``.

    At ratio 0, or where the rounding reaches ``tokens``, every token is kept. Half a multiple rounds up.
    """
    if ratio == 0:
        return tokens
    kept = math.floor((1.0 - ratio) * tokens / keep_multiple + 0.5) * keep_multiple
    return min(max(kept, keep_multiple), tokens)


def grid_first(scores: Tensor, height: int, width: int, stride: int, keep: int) -> Tensor:
    """``scores`` ``[B, H, N]`` by which the tokens at the crossings of a grid are chosen before all others.

    Where fewer tokens are kept than the grid has crossings, the grid becomes coarser until all of them fit.

    Args:
        height, width: of the map of ``N`` tokens. stride: between two lines. keep: how many tokens will be chosen.
    """
    while -(-height // stride) * -(-width // stride) > keep:
        stride += 1
    crossing = torch.zeros(height, width, dtype=torch.bool, device=scores.device)
    crossing[::stride, ::stride] = True
    return scores.masked_fill(crossing.flatten(), math.inf)
