from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from atedm_kernels._checks import check_self_attention
from atedm_kernels.ops.attention_map import map_flops
from atedm_kernels.ops.ranking import (
    DEFAULT_MAX_ITERATIONS,
    DEFAULT_TOLERANCE,
    SCHEMA,
    check_ranking,
    check_ranking_values,
    fake_ranking,
    prepare_ranking,
)
from atedm_kernels.ops.weighted_page_rank.native_kernel import weighted_page_rank_native
from atedm_kernels.ops.weighted_page_rank.reference import weighted_page_rank_reference
from atedm_kernels.registry import define_op, lazily


def _check(q: Tensor, k: Tensor, *others: Any) -> None:
    check_ranking(q, k, *others)
    check_self_attention(q, k)


def _flops(q: torch.Size, k: torch.Size, lse: torch.Size, scale: float | None, iterations: int, *_: object) -> int:
    """2·B·H·N²·D per iteration, for ``max_iterations``: an upper bound, as most heads converge earlier."""
    return map_flops(q, k[2]) * iterations


_op = define_op(
    f"weighted_page_rank{SCHEMA}",
    _check,
    fake_ranking,
    {
        "triton": lazily("atedm_kernels.ops.weighted_page_rank.triton_kernel", "weighted_page_rank_triton"),
        "native": weighted_page_rank_native,
        "reference": weighted_page_rank_reference,
    },
    check_values=check_ranking_values,
    prepare=prepare_ranking,
    flops=_flops,
)


def weighted_page_rank(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    *,
    scale: float | None = None,
    max_iterations: int = DEFAULT_MAX_ITERATIONS,
    tolerance: float = DEFAULT_TOLERANCE,
    initial: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Importance of the tokens of a self-attention map: its weighted PageRank (AT-EDM, section 3.2).

    The op starts from ``s = 1/N`` or ``initial`` and repeats ``s ← Aᵀ s``, normalised to sum 1. Each head stops on its
    own, when ``Σ|s − s_previous| < tolerance`` or after ``max_iterations``. Convergence is decided on the device: a GPU
    does not synchronise with the host.

    Args:
        q: ``[B, H, N, D]``, fp16, bf16 or fp32 (float64 too, for verification), ``D`` from 8 to 256, any strides.
        k: ``[B, H, N, D]``, dtype and device of ``q``.
        lse: ``[B, H, N]`` float32, from :func:`attention_with_logsumexp` on the same ``q``, ``k`` and ``scale``. Beyond
            1,000 in magnitude the result loses accuracy in proportion; ``ATEDM_CHECK=1`` makes that an error.
        scale: factor of the logits; ``1/sqrt(D)`` by default.
        max_iterations: at least 1. tolerance: at least 0; 0 runs every iteration.
        initial: ``[B, H, N]``, dtype of ``lse``: the scores to start from, such as those of the previous denoising
            step. Not negative, with a positive sum in each head; the op normalises them. Uniform by default.

    Returns:
        ``scores`` ``[B, H, N]`` float32, each head summing to 1, and ``iterations`` int32 ``[B, H]``, the number run.
        Scores are meant for choosing tokens, so they require no gradient.

    Raises:
        ValueError: an argument that does not fit. TypeError: a dtype that is not served.
    """
    return _op(q, k, lse, scale, max_iterations, tolerance, initial)
