from __future__ import annotations

from typing import Any

from torch import Tensor

from atedm_kernels._checks import FLOAT_DTYPES, check_index, check_index_values, check_tensor
from atedm_kernels.ops.gather_tokens.native_kernel import gather_rows_native
from atedm_kernels.ops.gather_tokens.reference import gather_rows_reference
from atedm_kernels.ops.sum_rows import sum_rows
from atedm_kernels.registry import Backward, define_op, lazily

# ``out[b, j] = x[b, index[b, j]]``. Recovering tokens is the same operation, with more indices than rows.
GATHER_ROWS = {
    "triton": lazily("atedm_kernels.ops.gather_tokens.triton_kernel", "gather_rows_triton"),
    "native": gather_rows_native,
    "reference": gather_rows_reference,
}


def _check(x: Tensor, index: Tensor) -> None:
    check_tensor("x", x, "B N C", FLOAT_DTYPES)
    check_index("index", index, x.shape[0], x.device)


def _check_values(x: Tensor, index: Tensor) -> None:
    check_index_values("index", index, x.shape[1], "positions in x")


def empty_rows(x: Tensor, index: Tensor) -> Tensor:
    """Uninitialised ``[B, K, C]`` for ``x`` ``[B, N, C]`` and ``index`` ``[B, K]``."""
    return x.new_empty(x.shape[0], index.shape[1], x.shape[2])


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    x, index = inputs
    ctx.save_for_backward(index)
    ctx.rows = x.shape[1]


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
    return sum_rows(gradient, *ctx.saved_tensors, ctx.rows), None


# The gradient of a row is the sum of the gradients of its copies.
GATHER_BACKWARD = Backward(_setup_context, _backward)

_op = define_op(
    "gather_tokens(Tensor x, Tensor index) -> Tensor",
    _check,
    empty_rows,
    GATHER_ROWS,
    check_values=_check_values,
    backward=GATHER_BACKWARD,
)


def gather_tokens(x: Tensor, index: Tensor) -> Tensor:
    """Copy the chosen tokens into a compact tensor: ``out[b, j] = x[b, index[b, j]]``.

    Args:
        x: ``[B, N, C]``, fp16, bf16 or fp32 (float64 too, for verification), any strides.
        index: int64 ``[B, K]``, values from 0 to ``N − 1``, on the device of ``x``.

    Returns:
        ``[B, K, C]``, contiguous. Differentiable in ``x``.

    Raises:
        ValueError: a shape or device that does not fit, or an index out of range (on a GPU only with
            ``ATEDM_CHECK=1``; without it such an index is clamped). TypeError: a dtype that is not served.
    """
    return _op(x, index)
