from __future__ import annotations

import torch
from torch import Tensor

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
from atedm_kernels.ops.weighted_page_rank_cross.native_kernel import weighted_page_rank_cross_native
from atedm_kernels.ops.weighted_page_rank_cross.reference import weighted_page_rank_cross_reference
from atedm_kernels.registry import define_op, lazily


def _flops(q: torch.Size, k: torch.Size, lse: torch.Size, scale: float | None, iterations: int, *_: object) -> int:
    """4·B·H·M·N·D per iteration (``Aᵀ s`` and ``A s``), for ``max_iterations``: an upper bound."""
    return 2 * map_flops(q, k[2]) * iterations


_op = define_op(
    f"weighted_page_rank_cross{SCHEMA}",
    check_ranking,
    fake_ranking,
    {
        "triton": lazily("atedm_kernels.ops.weighted_page_rank_cross.triton_kernel", "weighted_page_rank_cross_triton"),
        "native": weighted_page_rank_cross_native,
        "reference": weighted_page_rank_cross_reference,
    },
    check_values=check_ranking_values,
    prepare=prepare_ranking,
    flops=_flops,
)


def weighted_page_rank_cross(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    *,
    scale: float | None = None,
    max_iterations: int = DEFAULT_MAX_ITERATIONS,
    tolerance: float = DEFAULT_TOLERANCE,
    initial: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Importance of the queries of a cross-attention map: its weighted PageRank (AT-EDM, section 3.2).

    Image tokens are the queries, text tokens the keys. The op starts from ``s_Q = 1/M`` or ``initial`` and repeats
    ``s_K ← Aᵀ s_Q``, then ``s_Q(i) ← Σ_j A_ij s_K(j) / Σ_j (−A_ij ln A_ij)``, normalised to sum 1 (entropies under 1e-6
    count as 1e-6). Each head stops on its own, when ``Σ|s_Q − s_Q,previous| < tolerance`` or after ``max_iterations``.

    Args:
        q: ``[B, H, M, D]``, fp16, bf16 or fp32 (float64 too, for verification), ``D`` from 8 to 256, any strides.
        k: ``[B, H, N, D]``, dtype and device of ``q``.
        lse: ``[B, H, M]`` float32, from :func:`attention_with_logsumexp` on the same ``q``, ``k`` and ``scale``. Beyond
            1,000 in magnitude the result loses accuracy in proportion; ``ATEDM_CHECK=1`` makes that an error.
        scale: factor of the logits; ``1/sqrt(D)`` by default.
        max_iterations: at least 1. tolerance: at least 0; 0 runs every iteration.
        initial: ``[B, H, M]``, dtype of ``lse``: the scores to start from, such as those of the previous denoising
            step. Not negative, with a positive sum in each head; the op normalises them. Uniform by default.

    Returns:
        ``scores`` ``[B, H, M]`` float32, each head summing to 1, and ``iterations`` int32 ``[B, H]``, the number run.
        Scores are meant for choosing tokens, so they require no gradient.

    Raises:
        ValueError: an argument that does not fit. TypeError: a dtype that is not served.
    """
    return _op(q, k, lse, scale, max_iterations, tolerance, initial)
