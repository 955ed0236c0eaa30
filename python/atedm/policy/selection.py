"""How many tokens are kept, and which of them are kept before all others."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def kept_tokens(tokens: int, ratio: float, keep_multiple: int = 1) -> int:
    """``(1 − ratio) · tokens`` rounded to a multiple of ``keep_multiple``, between that multiple and ``tokens``.

    At ratio 0, or if rounding reaches ``tokens``, every token is kept. Half a multiple rounds up.
    """
    if ratio == 0:
        return tokens
    kept = math.floor((1.0 - ratio) * tokens / keep_multiple + 0.5) * keep_multiple
    return min(max(kept, keep_multiple), tokens)


def grid_first(scores: Tensor, height: int, width: int, stride: int, keep: int) -> Tensor:
    """Change ``scores`` ``[B, H, N]`` so that the tokens at the crossings of a grid are chosen before all others.

    If fewer tokens are kept than the grid has crossings, the grid becomes coarser until all crossings fit.

    Args:
        height, width: size of the map of ``N`` tokens. stride: distance between two lines of the grid. keep: number of
            tokens that will be chosen.

    Returns:
        A new tensor.
    """
    while -(-height // stride) * -(-width // stride) > keep:
        stride += 1
    crossing = torch.zeros(height, width, dtype=torch.bool, device=scores.device)
    crossing[::stride, ::stride] = True
    return scores.masked_fill(crossing.flatten(), math.inf)
