from __future__ import annotations

import torch
from torch import Tensor

from atedm_kernels._backends import choose
from atedm_kernels._checks import check_integer, check_tensor, check_tensors, values_are_checked
from atedm_kernels._library import define_op
from atedm_kernels.ops.select_tokens.native_kernel import select_tokens_native
from atedm_kernels.ops.select_tokens.reference import select_tokens_reference

_BACKENDS = ("triton", "native", "reference")

REDUCTIONS = ("rms", "mean")


def _check(scores: Tensor, keep: int, reduction: str) -> None:
    check_tensor("scores", scores, "B H N", (torch.float32, torch.float64))
    check_integer("keep", keep, 1, scores.shape[2])
    _check_reduction(reduction)


def _check_reduction(reduction: str) -> None:
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction is {reduction!r}; expected one of {', '.join(REDUCTIONS)}")


def _implementation(scores: Tensor, keep: int, reduction: str = "rms") -> Tensor:
    _check(scores, keep, reduction)
    if values_are_checked(scores) and bool(scores.isnan().any()):
        raise ValueError(f"scores holds {int(scores.isnan().sum())} NaN; expected numbers")
    backend, _ = choose("select_tokens", _BACKENDS, scores.device, scores.dtype)
    if backend == "triton":
        from atedm_kernels.ops.select_tokens.triton_kernel import select_tokens_triton

        return select_tokens_triton(scores, keep, reduction)
    select = select_tokens_native if backend == "native" else select_tokens_reference
    return select(scores, keep, reduction)


def _fake(scores: Tensor, keep: int, reduction: str = "rms") -> Tensor:
    _check(scores, keep, reduction)
    return scores.new_empty(scores.shape[0], keep, dtype=torch.int64)


_op = define_op(
    'select_tokens(Tensor scores, SymInt keep, str reduction="rms") -> Tensor',
    _implementation,
    _fake,
    _BACKENDS,
)


def select_tokens(scores: Tensor, keep: int, *, reduction: str = "rms") -> Tensor:
    """The ``keep`` most important tokens of each batch row, in ascending order.

    Heads are joined first, by root mean square (AT-EDM, section 3.2: it rewards a token that matters very much to a
    few heads) or mean. Ties go to the lower index. On a GPU without ``ATEDM_CHECK=1`` a token with a NaN score
    counts as the least important; elsewhere NaN is an error.

    Args:
        scores: ``[B, H, N]`` float32 (float64 too, for verification).
        keep: tokens to keep, 1 to ``N``.
        reduction: ``"rms"`` or ``"mean"``.

    Returns:
        int64 ``[B, keep]``, ascending.

    Raises:
        ValueError: a shape, ``keep``, ``reduction`` or NaN. TypeError: a dtype that is not served.
    """
    check_tensors(scores=scores)
    check_integer("keep", keep, 1)
    _check_reduction(reduction)
    return _op(scores, keep, reduction)
