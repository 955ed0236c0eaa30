"""Sums of rows: the gradient of every op that copies rows. For the package's own use."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from atedm_kernels._checks import (
    FLOAT_DTYPES,
    check_index,
    check_index_values,
    check_integer,
    check_shape,
    check_tensor,
)
from atedm_kernels.ops.sum_rows.native_kernel import sum_rows_native
from atedm_kernels.ops.sum_rows.reference import sum_rows_reference
from atedm_kernels.registry import Backward, define_op, lazily


def _check(x: Tensor, source: Tensor, slots: int) -> None:
    check_tensor("x", x, "B N C", FLOAT_DTYPES)
    check_index("source", source, x.shape[0], x.device)
    check_shape("source", source, tuple(x.shape[:2]), "batch and rows of x")
    check_integer("slots", slots, 1)


def _check_values(x: Tensor, source: Tensor, slots: int) -> None:
    check_index_values("source", source, slots, "slots of the sums")


def _fake(x: Tensor, source: Tensor, slots: int) -> Tensor:
    return x.new_empty(x.shape[0], slots, x.shape[2])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1])


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
    return torch.ops.atedm.recover_tokens(gradient, *ctx.saved_tensors), None, None


_op = define_op(
    "_sum_rows(Tensor x, Tensor source, SymInt slots) -> Tensor",
    _check,
    _fake,
    {
        "triton": lazily("atedm_kernels.ops.sum_rows.triton_kernel", "sum_rows_triton"),
        "native": sum_rows_native,
        "reference": sum_rows_reference,
    },
    check_values=_check_values,
    backward=Backward(_setup_context, _backward),
)


def sum_rows(x: Tensor, source: Tensor, slots: int) -> Tensor:
    """Add up rows by their slot: ``out[b, s] = Σ x[b, i]`` over the positions ``i`` with ``source[b, i] = s``.

    The order of each sum is fixed: same input, same output, bit for bit. Sums are in float32 and rounded once.

    Args:
        x: ``[B, N, C]``, fp16, bf16 or fp32 (float64 too, for verification), any strides.
        source: int64 ``[B, N]``, values from 0 to ``slots − 1``, on the device of ``x``.
        slots: number of sums.

    Returns:
        ``[B, slots, C]``, contiguous; zeros for a slot that no position names. Differentiable in ``x``.

    Raises:
        ValueError: a shape or device that does not fit, or a source out of range (on a GPU only with
            ``ATEDM_CHECK=1``; without it such a source is clamped). TypeError: a dtype that is not served.
    """
    return _op(x, source, slots)
