"""Top-k selection by the native CPU library (``csrc/select_tokens.cpp``)."""

from __future__ import annotations

import torch
from torch import Tensor

from atedm_kernels import native


def select_tokens_native(scores: Tensor, keep: int, reduction: str) -> Tensor:
    """The ``keep`` best tokens of each row, ascending; shapes as in the public op."""
    out = torch.empty(scores.shape[0], keep, dtype=torch.int64)
    reduction_code = native.REDUCTION_CODES[reduction]
    native.call(
        "atedm_select_tokens",
        scores.data_ptr(),
        native.strides(scores),
        *scores.shape,
        keep,
        reduction_code,
        out.data_ptr(),
    )
    return out
