from __future__ import annotations

import torch
from torch import Tensor

from atedm_kernels._checks import check_integer, check_tensor, values_are_checked
from atedm_kernels.ops.select_tokens.native_kernel import select_tokens_native
from atedm_kernels.ops.select_tokens.reference import select_tokens_reference
from atedm_kernels.registry import define_op, lazily

REDUCTIONS = ("rms", "mean")


def _check(scores: Tensor, keep: int, reduction: str) -> None:
    check_tensor("scores", scores, "B H N", (torch.float32, torch.float64))
    check_integer("keep", keep, 1, scores.shape[2])
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction is {reduction!r}; expected one of {', '.join(REDUCTIONS)}")


def _check_values(scores: Tensor, keep: int, reduction: str) -> None:
    if values_are_checked(scores) and bool(scores.isnan().any()):
        raise ValueError(f"scores holds {int(scores.isnan().sum())} NaN; expected numbers")


def _fake(scores: Tensor, keep: int, reduction: str) -> Tensor:
    return scores.new_empty(scores.shape[0], keep, dtype=torch.int64)


_op = define_op(
    'select_tokens(Tensor scores, SymInt keep, str reduction="rms") -> Tensor',
    _check,
    _fake,
    {
        "triton": lazily("atedm_kernels.ops.select_tokens.triton_kernel", "select_tokens_triton"),
        "native": select_tokens_native,
        "reference": select_tokens_reference,
    },
    check_values=_check_values,
)


def select_tokens(scores: Tensor, keep: int, *, reduction: str = "rms") -> Tensor:
    """The ``keep`` most important tokens of each batch row, in ascending order.

    Heads are joined first, by root mean square (AT-EDM, section 3.2: it rewards a token that matters very much to a
    few heads) or mean. Ties go to the lower index. On a GPU without ``ATEDM_CHECK=1`` a token with a NaN score
    counts as the least important; elsewhere NaN is an error.

    Args:
        scores: ``[B, H, N]`` float32 (float64 too, for verification).
        keep: number of tokens to keep, 1 to ``N``.
        reduction: ``"rms"`` or ``"mean"``.

    Returns:
        int64 ``[B, keep]``, ascending. No gradient flows through this choice to the scores.

    Raises:
        ValueError: a shape, ``keep`` or ``reduction`` that does not fit, or NaN. TypeError: a dtype that is not served.
    """
    return _op(scores, keep, reduction)
