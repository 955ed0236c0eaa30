"""Recovery of a token sequence: gathers rows, as ``gather_tokens`` does."""

from __future__ import annotations

from torch import Tensor

from atedm_kernels._checks import FLOAT_DTYPES, check_index, check_index_values, check_tensor
from atedm_kernels.ops.gather_tokens.op import GATHER_BACKWARD, GATHER_ROWS, empty_rows
from atedm_kernels.registry import define_op


def _check(x: Tensor, source: Tensor) -> None:
    check_tensor("x", x, "B K C", FLOAT_DTYPES)
    check_index("source", source, x.shape[0], x.device)


def _check_values(x: Tensor, source: Tensor) -> None:
    check_index_values("source", source, x.shape[1], "slots of x")


_op = define_op(
    "recover_tokens(Tensor x, Tensor source) -> Tensor",
    _check,
    empty_rows,
    GATHER_ROWS,
    check_values=_check_values,
    backward=GATHER_BACKWARD,
)


def recover_tokens(x: Tensor, source: Tensor) -> Tensor:
    """Refill every position from the compact tensor: ``out[b, i] = x[b, source[b, i]]``.

    Args:
        x: ``[B, K, C]``, fp16, bf16 or fp32 (float64 too, for verification), any strides.
        source: int64 ``[B, N]``, values from 0 to ``K − 1``, from :func:`similarity_source`.

    Returns:
        ``[B, N, C]``, contiguous. Differentiable in ``x``.

    Raises:
        ValueError: a shape or device that does not fit, or a source out of range (on a GPU only with
            ``ATEDM_CHECK=1``; without it such a source is clamped). TypeError: a dtype that is not served.
    """
    return _op(x, source)
