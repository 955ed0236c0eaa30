from __future__ import annotations

import torch
from torch import Tensor

from atedm_kernels._backends import choose
from atedm_kernels._checks import (
    check_attention_map,
    check_iteration,
    check_scale,
    check_self_attention,
    score_dtype,
    softmax_scale,
)
from atedm_kernels._library import define_op
from atedm_kernels.ops.weighted_page_rank.reference import weighted_page_rank_reference

_BACKENDS = ("triton", "reference")

# Provisional until they are chosen on trained attention maps: after five iterations the kept sets of synthetic maps
# no longer change, and an L1 change of 1e-3 in a distribution moves no more than rounding does in bf16.
DEFAULT_MAX_ITERATIONS = 5
DEFAULT_TOLERANCE = 1e-3


def _check(q: Tensor, k: Tensor, lse: Tensor, scale: float | None, max_iterations: int, tolerance: float) -> None:
    check_attention_map(q, k, lse)
    check_self_attention(q, k)
    check_scale(scale)
    check_iteration(max_iterations, tolerance)


def _implementation(
    q: Tensor, k: Tensor, lse: Tensor, scale: float | None, max_iterations: int, tolerance: float
) -> tuple[Tensor, Tensor]:
    _check(q, k, lse, scale, max_iterations, tolerance)
    scale = softmax_scale(q, scale)
    if choose("weighted_page_rank", _BACKENDS, q.device, q.dtype)[0] == "triton":
        from atedm_kernels.ops.weighted_page_rank.triton_kernel import weighted_page_rank_triton

        return weighted_page_rank_triton(q, k, lse, scale, max_iterations, tolerance)
    return weighted_page_rank_reference(q, k, lse, scale, max_iterations, tolerance)


def _fake(
    q: Tensor, k: Tensor, lse: Tensor, scale: float | None, max_iterations: int, tolerance: float
) -> tuple[Tensor, Tensor]:
    _check(q, k, lse, scale, max_iterations, tolerance)
    batch, heads, tokens, _ = q.shape
    scores = q.new_empty(batch, heads, tokens, dtype=score_dtype(q))
    return scores, q.new_empty(batch, heads, dtype=torch.int32)


_op = define_op(
    "weighted_page_rank(Tensor q, Tensor k, Tensor lse, float? scale, int max_iterations, float tolerance)"
    " -> (Tensor, Tensor)",
    _implementation,
    _fake,
    _BACKENDS,
)


def weighted_page_rank(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    *,
    scale: float | None = None,
    max_iterations: int = DEFAULT_MAX_ITERATIONS,
    tolerance: float = DEFAULT_TOLERANCE,
) -> tuple[Tensor, Tensor]:
    """Importance of the tokens of a self-attention map: its weighted PageRank (AT-EDM, section 3.2).

    ``s ← Aᵀ s`` from ``s = 1/N``, normalised to sum 1, in each head on its own until ``Σ|s − s_previous| <
    tolerance`` or ``max_iterations``. Convergence is decided on the device: no host synchronisation on a GPU.

    Args:
        q: ``[B, H, N, D]``, fp16, bf16 or fp32 (float64 too, for verification), ``D`` from 8 to 256, any strides.
        k: ``[B, H, N, D]``, dtype and device of ``q``.
        lse: ``[B, H, N]`` float32, from :func:`attention_with_logsumexp` on the same ``q``, ``k`` and ``scale``.
        scale: factor of the logits; ``1/sqrt(D)`` by default.
        max_iterations: at least 1. tolerance: at least 0; 0 runs every iteration.

    Returns:
        ``scores`` ``[B, H, N]`` float32, each head summing to 1, and ``iterations`` int32 ``[B, H]``, those run.

    Raises:
        ValueError: an argument that does not fit. TypeError: a dtype that is not served.
    """
    return _op(q, k, lse, scale, max_iterations, tolerance)
