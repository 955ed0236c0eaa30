"""Update of cached tokens and their feature map by the native CPU library (``csrc/update_feature_map.cpp``)."""

from __future__ import annotations

from torch import Tensor

from atedm_kernels import native
from atedm_kernels.ops.recover_feature_map.reference import empty_feature_map


def update_feature_map_native(x: Tensor, index: Tensor, cache: Tensor, residual: Tensor) -> Tensor:
    """Write ``x`` into ``cache``, then ``residual[b, :, n // w, n % w] + cache[b, n]``; shapes as in the public op."""
    out = empty_feature_map(x, residual)
    feature_map = native.feature_map(x, index, residual, out)
    native.call("atedm_update_feature_map", feature_map, cache.data_ptr(), native.strides(cache))
    return out
