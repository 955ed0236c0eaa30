"""Recovery into a feature map, with the residual, by the native CPU library (``csrc/recover_feature_map.cpp``)."""

from __future__ import annotations

from torch import Tensor

from atedm_kernels import _native


def recover_feature_map_native(x: Tensor, source: Tensor, residual: Tensor, out: Tensor) -> Tensor:
    """``out = residual[b, :, n // w, n % w] + x[b, source[b, n]]``; ``out`` contiguous or channels-last."""
    batch, channels, height, width = residual.shape
    feature_map = _native.FeatureMap(
        x.data_ptr(),
        residual.data_ptr(),
        source.data_ptr(),
        out.data_ptr(),
        batch,
        x.shape[1],
        channels,
        height,
        width,
        _native.strides(x),
        _native.strides(source),
        _native.strides(residual),
        _native.DTYPE_CODES[x.dtype],
        _native.DTYPE_CODES[residual.dtype],
        _native.DTYPE_CODES[out.dtype],
        not out.is_contiguous(),
    )
    _native.call("atedm_recover_feature_map", feature_map)
    return out
