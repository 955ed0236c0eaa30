"""Recovery into a feature map, with the residual, by the native CPU library (``csrc/recover_feature_map.cpp``)."""

from __future__ import annotations

from torch import Tensor

from atedm_kernels import native
from atedm_kernels.ops.recover_feature_map.reference import empty_feature_map


def recover_feature_map_native(x: Tensor, source: Tensor, residual: Tensor) -> Tensor:
    """``residual[b, :, n // w, n % w] + x[b, source[b, n]]``; shapes as in the public op."""
    out = empty_feature_map(x, residual)
    native.call("atedm_recover_feature_map", native.feature_map(x, source, residual, out))
    return out
