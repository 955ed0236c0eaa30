from __future__ import annotations

from torch import Tensor

from atedm_kernels._backends import choose
from atedm_kernels._checks import (
    check_query_key,
    check_scale,
    check_shape,
    check_tensor,
    check_tensors,
    score_dtype,
    softmax_scale,
)
from atedm_kernels._library import define_op
from atedm_kernels.ops.attention_with_logsumexp.fused import fused_attention
from atedm_kernels.ops.attention_with_logsumexp.reference import attention_with_logsumexp_reference

_BACKENDS = ("torch", "reference")


def _check(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> None:
    check_query_key(q, k)
    check_tensor("v", v, "B H N D", (q.dtype,), q.device)
    check_shape("v", v, tuple(k.shape), "the shape of k")
    check_scale(scale)


def _implementation(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> tuple[Tensor, Tensor]:
    _check(q, k, v, scale)
    scale = softmax_scale(q, scale)
    backend, _ = choose("attention_with_logsumexp", _BACKENDS, q.device, q.dtype)
    fused = fused_attention(q, k, v, scale) if backend == "torch" else None
    out, lse = attention_with_logsumexp_reference(q, k, v, scale) if fused is None else fused
    return out.transpose(1, 2).contiguous().transpose(1, 2), lse.to(score_dtype(q)).contiguous()


def _fake(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> tuple[Tensor, Tensor]:
    _check(q, k, v, scale)
    batch, heads, queries, head_dim = q.shape
    out = q.new_empty(batch, queries, heads, head_dim).transpose(1, 2)
    return out, q.new_empty(batch, heads, queries, dtype=score_dtype(q))


_op = define_op(
    "attention_with_logsumexp(Tensor q, Tensor k, Tensor v, float? scale=None) -> (Tensor, Tensor)",
    _implementation,
    _fake,
    _BACKENDS,
)


def attention_with_logsumexp(q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None) -> tuple[Tensor, Tensor]:
    """Fused attention that also returns the logsumexp of its logits.

    The kernel is the one that ``scaled_dot_product_attention`` would run (flash, cuDNN, memory-efficient, or the
    CPU flash kernel): each computes the logsumexp anyway, so it costs nothing. Where torch has no fused kernel for
    the inputs, a blocked softmax in float32 serves.

    Args:
        q: ``[B, H, M, D]``, fp16, bf16 or fp32 (float64 too, for verification), ``D`` from 8 to 256, any strides.
        k: ``[B, H, N, D]``. v: ``[B, H, N, D]``. Dtype and device of ``q``.
        scale: factor of the logits; ``1/sqrt(D)`` by default.

    Returns:
        ``out`` ``[B, H, M, D]`` in the dtype of ``q``, stored as ``[B, M, H, D]`` so that joining the heads is free,
        and ``lse`` ``[B, H, M]``, float32, natural log: ``log Σ_j exp(scale · q_i·k_j)``.

    Raises:
        ValueError: a shape, device or scale that does not fit. TypeError: a dtype that is not served.
    """
    check_tensors(q=q, k=k, v=v)
    check_scale(scale)
    return _op(q, k, v, scale)
