from __future__ import annotations

from torch import Tensor

from atedm_kernels._backends import choose
from atedm_kernels._checks import FLOAT_DTYPES, check_index, check_index_values, check_tensor, check_tensors
from atedm_kernels._library import define_op
from atedm_kernels.ops.gather_tokens.native_kernel import gather_rows_native
from atedm_kernels.ops.gather_tokens.reference import gather_rows_reference

BACKENDS = ("triton", "native", "reference")


def gather_rows(op: str, x: Tensor, index: Tensor) -> Tensor:
    """``out[b, j] = x[b, index[b, j]]`` by the backend that serves ``op``: gathering and recovering are one kernel."""
    backend, _ = choose(op, BACKENDS, x.device, x.dtype)
    if backend == "triton":
        from atedm_kernels.ops.gather_tokens.triton_kernel import gather_rows_triton

        return gather_rows_triton(x, index)
    return (gather_rows_native if backend == "native" else gather_rows_reference)(x, index)


def _check(x: Tensor, index: Tensor) -> None:
    check_tensor("x", x, "B N C", FLOAT_DTYPES)
    check_index("index", index, x.shape[0], x.device)


def _implementation(x: Tensor, index: Tensor) -> Tensor:
    _check(x, index)
    check_index_values("index", index, x.shape[1], "positions in x")
    return gather_rows("gather_tokens", x, index)


def _fake(x: Tensor, index: Tensor) -> Tensor:
    _check(x, index)
    return x.new_empty(x.shape[0], index.shape[1], x.shape[2])


_op = define_op("gather_tokens(Tensor x, Tensor index) -> Tensor", _implementation, _fake, BACKENDS)


def gather_tokens(x: Tensor, index: Tensor) -> Tensor:
    """Copy the chosen tokens into a compact tensor: ``out[b, j] = x[b, index[b, j]]``.

    Args:
        x: ``[B, N, C]``, fp16, bf16 or fp32 (float64 too, for verification), any strides.
        index: int64 ``[B, K]``, values from 0 to ``N − 1``, on the device of ``x``.

    Returns:
        ``[B, K, C]``, contiguous.

    Raises:
        ValueError: a shape or device that does not fit, or an index out of range (on a GPU only with
            ``ATEDM_CHECK=1``; without it such an index is clamped). TypeError: a dtype that is not served.
    """
    check_tensors(x=x, index=index)
    return _op(x, index)
