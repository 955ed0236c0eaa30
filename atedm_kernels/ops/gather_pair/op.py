"""Gather of the same tokens of two tensors, in one launch. For the package's own use."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from atedm_kernels._checks import FLOAT_DTYPES, check_index, check_index_values, check_shape, check_tensor
from atedm_kernels.ops.gather_tokens.native_kernel import gather_rows_native
from atedm_kernels.ops.gather_tokens.op import empty_rows
from atedm_kernels.ops.gather_tokens.reference import gather_rows_reference
from atedm_kernels.ops.sum_rows import sum_rows
from atedm_kernels.registry import Backward, define_op, lazily

Pair = tuple[Tensor, Tensor]


def _check(x: Tensor, y: Tensor, index: Tensor) -> None:
    check_tensor("x", x, "B N C", FLOAT_DTYPES)
    check_tensor("y", y, "B N C", FLOAT_DTYPES, x.device)
    check_shape("y", y, (*x.shape[:2], y.shape[2]), "batch and tokens of x")
    check_index("index", index, x.shape[0], x.device)


def _check_values(x: Tensor, y: Tensor, index: Tensor) -> None:
    check_index_values("index", index, x.shape[1], "positions in x")


def _of_each(gather: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor, Tensor], Pair]:
    return lambda x, y, index: (gather(x, index), gather(y, index))


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Pair) -> None:
    x, _, index = inputs
    ctx.save_for_backward(index)
    ctx.rows = x.shape[1]


def _backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    (index,) = ctx.saved_tensors
    of_x, of_y = (
        sum_rows(gradient, index, ctx.rows) if needed else None
        for gradient, needed in zip(gradients, ctx.needs_input_grad, strict=False)
    )
    return of_x, of_y, None


_op = define_op(
    "_gather_pair(Tensor x, Tensor y, Tensor index) -> (Tensor, Tensor)",
    _check,
    _of_each(empty_rows),
    {
        "triton": lazily("atedm_kernels.ops.gather_pair.triton_kernel", "gather_pair_triton"),
        "native": _of_each(gather_rows_native),
        "reference": _of_each(gather_rows_reference),
    },
    check_values=_check_values,
    backward=Backward(_setup_context, _backward),
)


def gather_pair(x: Tensor, y: Tensor, index: Tensor) -> Pair:
    """:func:`gather_tokens` of two tensors: ``x[b, index[b, j]]`` and ``y[b, index[b, j]]``.

    Args:
        x: ``[B, N, C]``. y: ``[B, N, C']``. Both fp16, bf16 or fp32 (float64 too, for verification), any strides.
        index: int64 ``[B, K]``, values from 0 to ``N − 1``, on the device of ``x``.

    Returns:
        ``[B, K, C]`` and ``[B, K, C']``, contiguous, each in its own dtype. Differentiable in ``x`` and ``y``.

    Raises:
        As :func:`gather_tokens`.
    """
    return _op(x, y, index)
