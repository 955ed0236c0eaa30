from __future__ import annotations

from torch import Tensor

from atedm_kernels._checks import (
    FLOAT_DTYPES,
    check_ascending,
    check_index,
    check_index_values,
    check_memory_apart,
    check_shape,
    check_tensor,
    check_writable,
)
from atedm_kernels.ops.recover_feature_map.reference import empty_feature_map
from atedm_kernels.ops.update_feature_map.native_kernel import update_feature_map_native
from atedm_kernels.ops.update_feature_map.reference import update_feature_map_reference
from atedm_kernels.registry import define_op, lazily


def _check(x: Tensor, index: Tensor, cache: Tensor, residual: Tensor) -> None:
    check_tensor("x", x, "B K C", FLOAT_DTYPES)
    check_tensor("residual", residual, "B C h w", FLOAT_DTYPES, x.device)
    batch, channels, height, width = residual.shape
    check_shape("x", x, (batch, x.shape[1], channels), "batch and channels of residual")
    check_tensor("cache", cache, "B N C", (x.dtype,), x.device)
    check_shape("cache", cache, (batch, height * width, channels), "batch, h·w positions and channels of residual")
    check_writable("cache", cache)
    check_index("index", index, batch, x.device)
    check_shape("index", index, (batch, x.shape[1]), "batch and slots of x")
    if index.shape[1] > cache.shape[1]:
        raise ValueError(
            f"index names {index.shape[1]} tokens in each row; expected at most {cache.shape[1]}, as in cache"
        )


def _check_values(x: Tensor, index: Tensor, cache: Tensor, residual: Tensor) -> None:
    check_memory_apart("x", x, "cache", cache)
    check_memory_apart("residual", residual, "cache", cache)
    check_index_values("index", index, cache.shape[1], "tokens of cache")
    check_ascending("index", index)


def _fake(x: Tensor, index: Tensor, cache: Tensor, residual: Tensor) -> Tensor:
    return empty_feature_map(x, residual)


_op = define_op(
    "update_feature_map(Tensor x, Tensor index, Tensor(a!) cache, Tensor residual) -> Tensor",
    _check,
    _fake,
    {
        "triton": lazily("atedm_kernels.ops.update_feature_map.triton_kernel", "update_feature_map_triton"),
        "native": update_feature_map_native,
        "reference": update_feature_map_reference,
    },
    check_values=_check_values,
)


def update_feature_map(x: Tensor, index: Tensor, cache: Tensor, residual: Tensor) -> Tensor:
    """Write the kept tokens into a cache of all tokens, and add the cache to the residual, in one pass.

    ``cache[b, index[b]] = x[b]``, then ``out[b, c, n // w, n % w] = residual[b, c, n // w, n % w] + cache[b, n, c]``:
    a kept token gets its new value, a dropped one the value of the call that last computed it. This is cached recovery,
    which is not part of AT-EDM.

    Args:
        x: ``[B, K, C]``, fp16, bf16 or fp32 (float64 too, for verification), any strides.
        index: int64 ``[B, K]``, values from 0 to ``N − 1``, ascending, no repeats, as :func:`select_tokens` returns.
        cache: ``[B, N, C]``, ``N = h·w``, the dtype of ``x``, any strides with which no elements share memory.
            **Written in place**, at the kept tokens only. It must not share memory with ``x`` or ``residual``.
        residual: ``[B, C, h, w]``, any strides.

    Returns:
        ``[B, C, h, w]`` in the memory format of ``residual`` (contiguous or channels-last) and the promoted dtype. The
        sum is rounded once. The op records no gradients: the output requires none.

    Raises:
        ValueError: a shape or device that does not fit, a cache that requires a gradient or shares memory, or an index
            out of range or not ascending (on a GPU only with ``ATEDM_CHECK=1``; without it a token out of range is
            skipped, the last row counts for a token named twice, and tokens out of order may be missed). TypeError: a
            dtype that is not served, or a cache whose dtype is not that of ``x``. Nothing is written if the op raises.
    """
    return _op(x, index, cache, residual)
