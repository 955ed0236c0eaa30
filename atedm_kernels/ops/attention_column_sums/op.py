from __future__ import annotations

from torch import Tensor

from atedm_kernels._backends import choose
from atedm_kernels._checks import (
    check_attention_map,
    check_scale,
    check_shape,
    check_tensor,
    check_tensors,
    score_dtype,
    softmax_scale,
)
from atedm_kernels._library import define_op
from atedm_kernels.ops.attention_column_sums.native_kernel import attention_column_sums_native
from atedm_kernels.ops.attention_column_sums.reference import attention_column_sums_reference

_BACKENDS = ("triton", "native", "reference")


def _check(q: Tensor, k: Tensor, lse: Tensor, weights: Tensor | None, scale: float | None) -> None:
    check_attention_map(q, k, lse)
    check_scale(scale)
    if weights is not None:
        check_tensor("weights", weights, "B H M", (lse.dtype,), q.device)
        check_shape("weights", weights, tuple(lse.shape), "the shape of lse")


def _implementation(
    q: Tensor, k: Tensor, lse: Tensor, weights: Tensor | None = None, scale: float | None = None
) -> Tensor:
    _check(q, k, lse, weights, scale)
    scale = softmax_scale(q, scale)
    backend, _ = choose("attention_column_sums", _BACKENDS, q.device, q.dtype)
    if backend == "triton":
        from atedm_kernels.ops.attention_column_sums.triton_kernel import attention_column_sums_triton

        return attention_column_sums_triton(q, k, lse, weights, scale)
    sums = attention_column_sums_native if backend == "native" else attention_column_sums_reference
    return sums(q, k, lse, weights, scale)


def _fake(q: Tensor, k: Tensor, lse: Tensor, weights: Tensor | None = None, scale: float | None = None) -> Tensor:
    _check(q, k, lse, weights, scale)
    return q.new_empty(k.shape[0], k.shape[1], k.shape[2], dtype=score_dtype(q))


_op = define_op(
    "attention_column_sums(Tensor q, Tensor k, Tensor lse, Tensor? weights=None, float? scale=None) -> Tensor",
    _implementation,
    _fake,
    _BACKENDS,
)


def attention_column_sums(
    q: Tensor, k: Tensor, lse: Tensor, weights: Tensor | None = None, *, scale: float | None = None
) -> Tensor:
    """Weighted column sums of an attention map that is never stored: ``Σ_i w_i A_ij``.

    ``A_ij = exp(scale · q_i·k_j − lse_i)``. With the default weights it is the mean attention that each key
    receives, one step of the ranking of AT-EDM (section 3.2).

    Args:
        q: ``[B, H, M, D]``, fp16, bf16 or fp32 (float64 too, for verification), ``D`` from 8 to 256, any strides.
        k: ``[B, H, N, D]``, dtype and device of ``q``.
        lse: ``[B, H, M]`` float32, from :func:`attention_with_logsumexp` on the same ``q``, ``k`` and ``scale``.
        weights: ``[B, H, M]`` float32; uniform ``1/M`` by default.
        scale: factor of the logits; ``1/sqrt(D)`` by default.

    Returns:
        ``[B, H, N]`` float32.

    Raises:
        ValueError: a shape, device or scale that does not fit. TypeError: a dtype that is not served.
    """
    check_tensors(q=q, k=k, lse=lse)
    if weights is not None:
        check_tensors(weights=weights)
    check_scale(scale)
    return _op(q, k, lse, weights, scale)
