"""Which kept token refills each position, by the native CPU library (``csrc/similarity_source.cpp``)."""

from __future__ import annotations

import torch
from torch import Tensor

from atedm_kernels import native


def similarity_source_native(q: Tensor, k: Tensor, lse: Tensor, index: Tensor, scale: float) -> Tensor:
    """``argmax_j mean_h A[index[j], i]``; a kept token takes its own slot; shapes as in the public op."""
    source = torch.empty(q.shape[0], q.shape[2], dtype=torch.int64)
    native.call(
        "atedm_similarity_source",
        native.attention_map(q, k, lse, scale),
        index.data_ptr(),
        native.strides(index),
        index.shape[1],
        source.data_ptr(),
    )
    return source
