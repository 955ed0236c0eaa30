"""Drift of tokens: how far the input of each has moved since the token was computed. For the package's own use."""

from __future__ import annotations

import torch
from torch import Tensor

from atedm_kernels._checks import FLOAT_DTYPES, check_shape, check_tensor
from atedm_kernels.ops.token_drift.native_kernel import token_drift_native
from atedm_kernels.ops.token_drift.reference import token_drift_reference
from atedm_kernels.registry import define_op, lazily


def _check(x: Tensor, projection: Tensor, seen: Tensor) -> None:
    check_tensor("x", x, "B C h w", FLOAT_DTYPES)
    check_tensor("projection", projection, "W C", FLOAT_DTYPES, x.device)
    check_shape("projection", projection, (projection.shape[0], x.shape[1]), "its width, and the channels of x")
    check_tensor("seen", seen, "B W N", (projection.dtype,), x.device)
    batch, _, height, width = x.shape
    check_shape("seen", seen, (batch, projection.shape[0], height * width), "batch of x, width, tokens of x")


def _fake(x: Tensor, projection: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
    batch, width, tokens = seen.shape
    return seen.new_empty(batch, width, tokens), seen.new_empty(batch, 1, tokens, dtype=torch.float32)


def _flops(x: tuple[int, ...], projection: tuple[int, ...], seen: tuple[int, ...]) -> int:
    batch, width, tokens = seen
    return 2 * batch * width * tokens * x[1]


_op = define_op(
    "_token_drift(Tensor x, Tensor projection, Tensor seen) -> (Tensor, Tensor)",
    _check,
    _fake,
    {
        "triton": lazily("atedm_kernels.ops.token_drift.triton_kernel", "token_drift_triton"),
        "native": token_drift_native,
        "reference": token_drift_reference,
    },
    flops=_flops,
)


def token_drift(x: Tensor, projection: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
    """Project each token of a feature map to a few numbers, and measure how far they are from earlier ones.

    ``observed[b, :, i] = projection @ x[b, :, i // w, i % w]``, rounded once, then
    ``drift[b, 0, i] = ‖observed[b, :, i] − seen[b, :, i]‖₂`` (ours; a random projection keeps distances well enough to
    rank by: Johnson and Lindenstrauss, 1984).

    Args:
        x: ``[B, C, h, w]``, fp16, bf16 or fp32 (float64 too, for verification), any strides.
        projection: ``[W, C]``, a float dtype.
        seen: ``[B, W, N]``, ``N = h·w``, the dtype of ``projection``, any strides: an earlier ``observed``.

    Returns:
        ``observed`` ``[B, W, N]`` in the dtype of ``projection``, and ``drift`` ``[B, 1, N]``, float32; both
        contiguous. No gradients: the outputs require none.

    Raises:
        ValueError: a shape or device that does not fit. TypeError: a dtype that is not served.
    """
    return _op(x, projection, seen)
