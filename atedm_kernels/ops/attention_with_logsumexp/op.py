from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from atedm_kernels._checks import (
    check_query_key,
    check_scale,
    check_shape,
    check_tensor,
    score_dtype,
    softmax_scale,
)
from atedm_kernels.ops.attention_backward import attention_backward
from atedm_kernels.ops.attention_map import map_flops
from atedm_kernels.ops.attention_with_logsumexp.reference import attention_with_logsumexp_reference
from atedm_kernels.ops.attention_with_logsumexp.torch_kernel import attention_with_logsumexp_torch
from atedm_kernels.registry import Backward, define_op


def _check(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> None:
    check_query_key(q, k)
    check_tensor("v", v, "B H N D", (q.dtype,), q.device)
    check_shape("v", v, tuple(k.shape), "the shape of k")
    check_scale(scale)


def _fake(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> tuple[Tensor, Tensor]:
    batch, heads, queries, head_dim = q.shape
    out = q.new_empty(batch, queries, heads, head_dim).transpose(1, 2)
    return out, q.new_empty(batch, heads, queries, dtype=score_dtype(q))


def _prepare(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> tuple[Tensor, Tensor, Tensor, float]:
    return q, k, v, softmax_scale(q, scale)


def _flops(q: torch.Size, k: torch.Size, *_: object) -> int:
    """4·B·H·M·N·D, as torch counts attention; the logsumexp is free."""
    return 2 * map_flops(q, k[2])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.scale = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(*tensors, out, lse)


def _backward(ctx: Any, gradient: Tensor, _: Tensor | None) -> tuple[Tensor, Tensor, Tensor, None]:
    return *attention_backward(gradient, *ctx.saved_tensors, ctx.scale), None


_op = define_op(
    "attention_with_logsumexp(Tensor q, Tensor k, Tensor v, float? scale=None) -> (Tensor, Tensor)",
    _check,
    _fake,
    {"torch": attention_with_logsumexp_torch, "reference": attention_with_logsumexp_reference},
    prepare=_prepare,
    flops=_flops,
    backward=Backward(_setup_context, _backward),
)


def attention_with_logsumexp(q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None) -> tuple[Tensor, Tensor]:
    """Fused attention that also returns the logsumexp of its logits.

    The kernel is the one that ``scaled_dot_product_attention`` would run (flash, cuDNN, memory-efficient, or the CPU
    flash kernel). Each of them computes the logsumexp anyway, so it costs nothing. If torch has no fused kernel for the
    inputs, a blocked softmax in float32 runs instead.

    Args:
        q: ``[B, H, M, D]``, fp16, bf16 or fp32 (float64 too, for verification), ``D`` from 8 to 256, any strides.
        k, v: ``[B, H, N, D]``, dtype and device of ``q``.
        scale: factor of the logits; ``1/sqrt(D)`` by default.

    Returns:
        ``out`` ``[B, H, M, D]`` in the dtype of ``q``, stored as ``[B, M, H, D]`` so that joining the heads is free,
        and ``lse`` ``[B, H, M]``, float32, natural log: ``log Σ_j exp(scale · q_i·k_j)``.
        ``out`` is differentiable in ``q``, ``k`` and ``v``. ``lse`` is meant for choosing tokens, so it requires no
        gradient.

    Raises:
        ValueError: a shape, device or scale that does not fit. TypeError: a dtype that is not served.
    """
    return _op(q, k, v, scale)
