"""Gradients of attention. For the package's own use."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from atedm_kernels._checks import check_attention_map, check_scale, check_shape, check_tensor, softmax_scale
from atedm_kernels.ops.attention_backward.reference import (
    Gradients,
    attention_backward_reference,
    empty_gradients,
)
from atedm_kernels.ops.attention_backward.torch_kernel import attention_backward_torch
from atedm_kernels.ops.attention_map import map_flops
from atedm_kernels.registry import Backward, define_op


def _check(gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float | None) -> None:
    check_attention_map(q, k, lse)
    check_tensor("v", v, "B H N D", (q.dtype,), q.device)
    check_shape("v", v, tuple(k.shape), "the shape of k")
    for name, tensor in (("gradient", gradient), ("out", out)):
        check_tensor(name, tensor, "B H M D", (q.dtype,), q.device)
        check_shape(name, tensor, tuple(q.shape), "the shape of q")
    check_scale(scale)


def _fake(gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: object) -> Gradients:
    return empty_gradients(q, k, v)


def _prepare(gradient: Tensor, q: Tensor, *arguments: Any) -> tuple[Any, ...]:
    *tensors, scale = arguments
    return gradient, q, *tensors, softmax_scale(q, scale)


def _flops(gradient: Any, q: Any, k: Any, *_: object) -> int:
    """10·B·H·M·N·D, as torch counts it: five products."""
    return 5 * map_flops(q, k[2])


def _refuse(ctx: Any, *gradients: Tensor) -> None:
    raise NotImplementedError(
        "the second derivative of an attention is asked for; expected first derivatives only, as with torch's own "
        "fused attention"
    )


_op = define_op(
    "_attention_backward(Tensor gradient, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, float? scale=None) "
    "-> (Tensor, Tensor, Tensor)",
    _check,
    _fake,
    {"torch": attention_backward_torch, "reference": attention_backward_reference},
    prepare=_prepare,
    flops=_flops,
    backward=Backward(None, _refuse),
)


def attention_backward(
    gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float | None
) -> Gradients:
    """Gradients of the ``out`` of :func:`attention_with_logsumexp` with respect to its inputs.

    The kernel is the one that torch would run for attention. On GPUs, some of torch's kernels add up in an order that
    varies from run to run, unless ``torch.use_deterministic_algorithms`` is set. The same holds without pruning.

    Args:
        gradient: the gradient of ``out``, ``[B, H, M, D]``, any strides.
        q, k, v, scale: the inputs of the forward.
        out, lse: the results of the forward.

    Returns:
        The gradients of ``q`` ``[B, H, M, D]``, ``k`` and ``v`` ``[B, H, N, D]``, each stored as ``[B, N, H, D]``.

    Raises:
        ValueError: a shape, device or scale that does not fit. TypeError: a dtype that is not served.
    """
    return _op(gradient, q, k, v, out, lse, scale)
