from __future__ import annotations

import torch
from torch import Tensor

from atedm_kernels._backends import choose
from atedm_kernels._checks import (
    FLOAT_DTYPES,
    check_index,
    check_index_values,
    check_shape,
    check_tensor,
    check_tensors,
)
from atedm_kernels._library import define_op
from atedm_kernels.ops.recover_feature_map.native_kernel import recover_feature_map_native
from atedm_kernels.ops.recover_feature_map.reference import recover_feature_map_reference

_BACKENDS = ("triton", "native", "reference")


def _check(x: Tensor, source: Tensor, residual: Tensor) -> None:
    check_tensor("x", x, "B K C", FLOAT_DTYPES)
    check_tensor("residual", residual, "B C h w", FLOAT_DTYPES, x.device)
    batch, channels, height, width = residual.shape
    check_shape("x", x, (batch, x.shape[1], channels), "batch and channels of residual")
    check_index("source", source, x.shape[0], x.device)
    check_shape("source", source, (batch, height * width), "batch and h·w positions of residual")


def empty_output(x: Tensor, residual: Tensor) -> Tensor:
    """Uninitialised output in the memory format of ``residual`` and the dtype that adding the two gives."""
    # By the strides, so that a slice of a channels-last map counts as one too.
    channels_last = residual.stride(1) == 1 and residual.shape[1] > 1 and not residual.is_contiguous()
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    dtype = torch.promote_types(x.dtype, residual.dtype)
    return torch.empty_like(residual, dtype=dtype, memory_format=memory_format)


def _implementation(x: Tensor, source: Tensor, residual: Tensor) -> Tensor:
    _check(x, source, residual)
    check_index_values("source", source, x.shape[1], "slots of x")
    out = empty_output(x, residual)
    backend, _ = choose("recover_feature_map", _BACKENDS, x.device, out.dtype)
    if backend == "triton":
        from atedm_kernels.ops.recover_feature_map.triton_kernel import recover_feature_map_triton

        return recover_feature_map_triton(x, source, residual, out)
    if backend == "native":
        return recover_feature_map_native(x, source, residual, out)
    return out.copy_(recover_feature_map_reference(x, source, residual))


def _fake(x: Tensor, source: Tensor, residual: Tensor) -> Tensor:
    _check(x, source, residual)
    return empty_output(x, residual)


_op = define_op(
    "recover_feature_map(Tensor x, Tensor source, Tensor residual) -> Tensor", _implementation, _fake, _BACKENDS
)


def recover_feature_map(x: Tensor, source: Tensor, residual: Tensor) -> Tensor:
    """Refill a feature map from the compact tensor and add the residual, in one pass.

    ``out[b, c, n // w, n % w] = residual[b, c, n // w, n % w] + x[b, source[b, n], c]``.

    Args:
        x: ``[B, K, C]``, fp16, bf16 or fp32 (float64 too, for verification), any strides.
        source: int64 ``[B, h·w]``, values from 0 to ``K − 1``, from :func:`similarity_source`.
        residual: ``[B, C, h, w]``, any strides.

    Returns:
        ``[B, C, h, w]`` in the memory format of ``residual`` (channels-last stays so) and the promoted dtype.

    Raises:
        ValueError: a shape or device that does not fit, or a source out of range (on a GPU only with
            ``ATEDM_CHECK=1``; without it such a source is clamped). TypeError: a dtype that is not served.
    """
    check_tensors(x=x, source=source, residual=residual)
    return _op(x, source, residual)
