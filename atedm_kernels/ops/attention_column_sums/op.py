from __future__ import annotations

import torch
from torch import Tensor

from atedm_kernels._checks import (
    check_attention_map,
    check_logits,
    check_scale,
    check_shape,
    check_tensor,
    score_dtype,
    softmax_scale,
)
from atedm_kernels.ops.attention_column_sums.native_kernel import attention_column_sums_native
from atedm_kernels.ops.attention_column_sums.reference import attention_column_sums_reference
from atedm_kernels.ops.attention_map import map_flops
from atedm_kernels.registry import define_op, lazily


def _check(q: Tensor, k: Tensor, lse: Tensor, weights: Tensor | None, scale: float | None) -> None:
    check_attention_map(q, k, lse)
    check_scale(scale)
    if weights is not None:
        check_tensor("weights", weights, "B H M", (lse.dtype,), q.device)
        check_shape("weights", weights, tuple(lse.shape), "the shape of lse")


def _fake(q: Tensor, k: Tensor, lse: Tensor, weights: Tensor | None, scale: float | None) -> Tensor:
    return q.new_empty(k.shape[:3], dtype=score_dtype(q))


def _prepare(
    q: Tensor, k: Tensor, lse: Tensor, weights: Tensor | None, scale: float | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, float]:
    return q, k, lse, weights, softmax_scale(q, scale)


def _flops(q: torch.Size, k: torch.Size, *_: object) -> int:
    """2·B·H·M·N·D: the logits. Sums and exponentials are not counted."""
    return map_flops(q, k[2])


_op = define_op(
    "attention_column_sums(Tensor q, Tensor k, Tensor lse, Tensor? weights=None, float? scale=None) -> Tensor",
    _check,
    _fake,
    {
        "triton": lazily("atedm_kernels.ops.attention_column_sums.triton_kernel", "attention_column_sums_triton"),
        "native": attention_column_sums_native,
        "reference": attention_column_sums_reference,
    },
    check_values=lambda q, k, lse, *_: check_logits(lse),
    prepare=_prepare,
    flops=_flops,
)


def attention_column_sums(
    q: Tensor, k: Tensor, lse: Tensor, weights: Tensor | None = None, *, scale: float | None = None
) -> Tensor:
    """Weighted column sums of an attention map that is never stored: ``Σ_i w_i A_ij``.

    ``A_ij = exp(scale · q_i·k_j − lse_i)``. With the default weights this is the mean attention that each key receives,
    which is one step of AT-EDM's ranking (section 3.2).

    Args:
        q: ``[B, H, M, D]``, fp16, bf16 or fp32 (float64 too, for verification), ``D`` from 8 to 256, any strides.
        k: ``[B, H, N, D]``, dtype and device of ``q``.
        lse: ``[B, H, M]`` float32, from :func:`attention_with_logsumexp` on the same ``q``, ``k`` and ``scale``. Beyond
            1,000 in magnitude the result loses accuracy in proportion; ``ATEDM_CHECK=1`` makes that an error.
        weights: ``[B, H, M]`` float32; uniform ``1/M`` by default.
        scale: factor of the logits; ``1/sqrt(D)`` by default.

    Returns:
        ``[B, H, N]`` float32, meant for choosing tokens, so it requires no gradient.

    Raises:
        ValueError: a shape, device or scale that does not fit. TypeError: a dtype that is not served.
    """
    return _op(q, k, lse, weights, scale)
