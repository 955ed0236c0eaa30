"""Gather of rows by the native CPU library (``csrc/gather_rows.cpp``)."""

from __future__ import annotations

import torch
from torch import Tensor

from atedm_kernels import native


def gather_rows_native(x: Tensor, index: Tensor) -> Tensor:
    """``out[b, j] = x[b, index[b, j]]``, contiguous; an index out of range is clamped."""
    out = torch.empty(x.shape[0], index.shape[1], x.shape[2], dtype=x.dtype)
    native.call(
        "atedm_gather_rows",
        x.data_ptr(),
        native.strides(x),
        *x.shape,
        x.element_size(),
        index.data_ptr(),
        native.strides(index),
        index.shape[1],
        out.data_ptr(),
    )
    return out
