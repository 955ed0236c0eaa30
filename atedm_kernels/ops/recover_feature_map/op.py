from __future__ import annotations

from typing import Any

from torch import Tensor

from atedm_kernels._checks import FLOAT_DTYPES, check_index, check_index_values, check_shape, check_tensor
from atedm_kernels.ops.recover_feature_map.native_kernel import recover_feature_map_native
from atedm_kernels.ops.recover_feature_map.reference import empty_feature_map, recover_feature_map_reference
from atedm_kernels.ops.sum_rows import sum_rows
from atedm_kernels.registry import Backward, define_op, lazily


def _check(x: Tensor, source: Tensor, residual: Tensor) -> None:
    check_tensor("x", x, "B K C", FLOAT_DTYPES)
    check_tensor("residual", residual, "B C h w", FLOAT_DTYPES, x.device)
    batch, channels, height, width = residual.shape
    check_shape("x", x, (batch, x.shape[1], channels), "batch and channels of residual")
    check_index("source", source, x.shape[0], x.device)
    check_shape("source", source, (batch, height * width), "batch and h·w positions of residual")


def _check_values(x: Tensor, source: Tensor, residual: Tensor) -> None:
    check_index_values("source", source, x.shape[1], "slots of x")


def _fake(x: Tensor, source: Tensor, residual: Tensor) -> Tensor:
    return empty_feature_map(x, residual)


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    x, source, residual = inputs
    ctx.save_for_backward(source)
    ctx.slots, ctx.dtypes = x.shape[1], (x.dtype, residual.dtype)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None, Tensor | None]:
    of_x = of_residual = None
    x_dtype, residual_dtype = ctx.dtypes
    if ctx.needs_input_grad[0]:
        (source,) = ctx.saved_tensors
        # Operations that torch.autograd.grad can batch: flatten and mT are not.
        tokens = gradient.reshape(*gradient.shape[:2], source.shape[1]).transpose(1, 2)
        of_x = sum_rows(tokens, source, ctx.slots).to(x_dtype)
    if ctx.needs_input_grad[2]:
        of_residual = gradient.to(residual_dtype)
    return of_x, None, of_residual


_op = define_op(
    "recover_feature_map(Tensor x, Tensor source, Tensor residual) -> Tensor",
    _check,
    _fake,
    {
        "triton": lazily("atedm_kernels.ops.recover_feature_map.triton_kernel", "recover_feature_map_triton"),
        "native": recover_feature_map_native,
        "reference": recover_feature_map_reference,
    },
    check_values=_check_values,
    backward=Backward(_setup_context, _backward),
)


def recover_feature_map(x: Tensor, source: Tensor, residual: Tensor) -> Tensor:
    """Refill a feature map from the compact tensor and add the residual, in one pass.

    ``out[b, c, n // w, n % w] = residual[b, c, n // w, n % w] + x[b, source[b, n], c]``.

    Args:
        x: ``[B, K, C]``, fp16, bf16 or fp32 (float64 too, for verification), any strides.
        source: int64 ``[B, h·w]``, values from 0 to ``K − 1``, from :func:`similarity_source`.
        residual: ``[B, C, h, w]``, any strides.

    Returns:
        ``[B, C, h, w]`` in the memory format of ``residual`` (contiguous or channels-last) and the promoted dtype.
        Differentiable in ``x`` and ``residual``.

    Raises:
        ValueError: a shape or device that does not fit, or a source out of range (on a GPU only with
            ``ATEDM_CHECK=1``; without it such a source is clamped). TypeError: a dtype that is not served.
    """
    return _op(x, source, residual)
