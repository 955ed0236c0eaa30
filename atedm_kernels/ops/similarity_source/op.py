from __future__ import annotations

import torch
from torch import Tensor

from atedm_kernels._checks import (
    check_attention_map,
    check_index,
    check_index_values,
    check_logits,
    check_scale,
    check_self_attention,
    softmax_scale,
)
from atedm_kernels.ops.attention_map import map_flops
from atedm_kernels.ops.similarity_source.native_kernel import similarity_source_native
from atedm_kernels.ops.similarity_source.reference import similarity_source_reference
from atedm_kernels.registry import define_op, lazily


def _check(q: Tensor, k: Tensor, lse: Tensor, index: Tensor, scale: float | None) -> None:
    check_attention_map(q, k, lse)
    check_self_attention(q, k)
    check_index("index", index, q.shape[0], q.device)
    if index.shape[1] > q.shape[2]:
        raise ValueError(f"index names {index.shape[1]} tokens in each row; expected at most {q.shape[2]}, as in q")
    check_scale(scale)


def _check_values(q: Tensor, k: Tensor, lse: Tensor, index: Tensor, scale: float | None) -> None:
    check_logits(lse)
    check_index_values("index", index, q.shape[2], "tokens of q")


def _fake(q: Tensor, k: Tensor, lse: Tensor, index: Tensor, scale: float | None) -> Tensor:
    return q.new_empty(q.shape[0], q.shape[2], dtype=torch.int64)


def _prepare(
    q: Tensor, k: Tensor, lse: Tensor, index: Tensor, scale: float | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, float]:
    return q, k, lse, index, softmax_scale(q, scale)


def _flops(q: torch.Size, k: torch.Size, lse: torch.Size, index: torch.Size, *_: object) -> int:
    """2·B·H·K·N·D: the logits of the kept tokens by every key. The kernels skip the keys of the kept tokens."""
    batch, heads, _, head_dim = q
    return map_flops((batch, heads, index[1], head_dim), k[2])


_op = define_op(
    "similarity_source(Tensor q, Tensor k, Tensor lse, Tensor index, float? scale=None) -> Tensor",
    _check,
    _fake,
    {
        "triton": lazily("atedm_kernels.ops.similarity_source.triton_kernel", "similarity_source_triton"),
        "native": similarity_source_native,
        "reference": similarity_source_reference,
    },
    check_values=_check_values,
    prepare=_prepare,
    flops=_flops,
)


def similarity_source(q: Tensor, k: Tensor, lse: Tensor, index: Tensor, *, scale: float | None = None) -> Tensor:
    """The slot of the compact tensor that refills each position (AT-EDM, section 3.3, similarity-based copy).

    A dropped token ``i`` takes the kept token ``j`` that attends to it most, averaged over the heads: the largest
    ``mean_h A_ji``, with ``A_ji = exp(scale · q_j·k_i − lse_j)`` (ties: the lowest slot; NaN counts as least). A kept
    token takes its own slot. Only the kept tokens' ``q`` and ``lse`` and the dropped tokens' ``k`` matter.

    Args:
        q: ``[B, H, N, D]``, fp16, bf16 or fp32 (float64 too, for verification), ``D`` from 8 to 256, any strides.
        k: ``[B, H, N, D]``, dtype and device of ``q``.
        lse: ``[B, H, N]`` float32, from :func:`attention_with_logsumexp` on the same ``q``, ``k`` and ``scale``. Beyond
            1,000 in magnitude the result loses accuracy in proportion; ``ATEDM_CHECK=1`` makes that an error.
        index: int64 ``[B, K]``, the kept tokens, from :func:`select_tokens`, without repeats.
        scale: factor of the logits; ``1/sqrt(D)`` by default.

    Returns:
        int64 ``[B, N]``, values from 0 to ``K − 1``: the argument ``source`` of the recovery ops. No gradient flows
        through this choice.

    Raises:
        ValueError: an argument that does not fit, or an index out of range (on a GPU only with
            ``ATEDM_CHECK=1``; without it such an index is clamped). TypeError: a dtype that is not served.
    """
    return _op(q, k, lse, index, scale)
