"""Recovery into a feature map, with the residual, by the native CPU library (``csrc/recover_feature_map.cpp``)."""

from __future__ import annotations

from torch import Tensor

from atedm_kernels import native
from atedm_kernels.ops.recover_feature_map.reference import empty_feature_map


def recover_feature_map_native(x: Tensor, source: Tensor, residual: Tensor) -> Tensor:
    """``residual[b, :, n // w, n % w] + x[b, source[b, n]]``; shapes as in the public op."""
    out = empty_feature_map(x, residual)
    batch, channels, height, width = residual.shape
    feature_map = native.FeatureMapStruct(
        x.data_ptr(),
        residual.data_ptr(),
        source.data_ptr(),
        out.data_ptr(),
        batch,
        x.shape[1],
        channels,
        height,
        width,
        native.strides(x),
        native.strides(source),
        native.strides(residual),
        native.DTYPE_CODES[x.dtype],
        native.DTYPE_CODES[residual.dtype],
        native.DTYPE_CODES[out.dtype],
        not out.is_contiguous(),
    )
    native.call("atedm_recover_feature_map", feature_map)
    return out
