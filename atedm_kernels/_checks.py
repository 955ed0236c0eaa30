"""Checks of op arguments. Every error names the argument, what it is, and what it should be.

Shapes, dtypes and devices are always checked: this needs no synchronisation. Values (an index in range, scores without
NaN) are always checked on the CPU, but on a GPU only with ``ATEDM_CHECK=1``. The size of logits is checked only with
``ATEDM_CHECK=1``, on the CPU too.
"""

from __future__ import annotations

import functools
import math
import os

import torch
from torch import Tensor

from atedm_kernels.backends import KERNEL_DTYPES

FLOAT_DTYPES = (*KERNEL_DTYPES, torch.float64)
MIN_HEAD_DIM, MAX_HEAD_DIM = 8, 256
MAX_FLOAT32 = torch.finfo(torch.float32).max
MAX_COUNT = 2**31 - 1  # the ops return iterations as int32

# Rounding to float32 gives the elements of a map a relative error in proportion to the largest logit: 2e-7 of it on a
# CPU, 6e-7 where torch's attention multiplies float32 as three products of TF32 (measured on an H100, logit 990). Up to
# this logit the error stays within the promised 2e-4.
MAX_LOGIT = 300.0

_split = functools.cache(str.split)  # each call of an op runs the checks


def values_are_checked(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu" or (tensor.device.type == "cuda" and os.environ.get("ATEDM_CHECK") == "1")


def _shape(tensor: Tensor) -> str:
    return "[" + ", ".join(str(n) for n in tensor.shape) + "]"


def check_tensor(
    name: str, tensor: Tensor, layout: str, dtypes: tuple[torch.dtype, ...], device: torch.device | None = None
) -> None:
    """Check a tensor. ``layout`` names its dimensions, as in ``"B H N D"``; none of them may be empty."""
    dims = _split(layout)
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} is a {type(tensor).__name__}; expected a tensor [{', '.join(dims)}]")
    if tensor.ndim != len(dims):
        raise ValueError(f"{name} has shape {_shape(tensor)}; expected {len(dims)} dimensions [{', '.join(dims)}]")
    if tensor.dtype not in dtypes:
        raise TypeError(f"{name} has dtype {tensor.dtype}; expected {' or '.join(str(d) for d in dtypes)}")
    if device is not None and tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device}; expected {device}, where the other tensors are")
    if 0 in tensor.shape:
        dim = dims[tensor.shape.index(0)]
        raise ValueError(f"{name} has shape {_shape(tensor)}; expected at least one element in dimension {dim}")


def check_shape(name: str, tensor: Tensor, expected: tuple[int, ...], meaning: str) -> None:
    if tuple(tensor.shape) != tuple(expected):
        wanted = "[" + ", ".join(str(n) for n in expected) + "]"
        raise ValueError(f"{name} has shape {_shape(tensor)}; expected {wanted} ({meaning})")


def check_query_key(q: Tensor, k: Tensor) -> None:
    check_tensor("q", q, "B H M D", FLOAT_DTYPES)
    check_tensor("k", k, "B H N D", (q.dtype,), q.device)
    check_shape("k", k, (q.shape[0], q.shape[1], k.shape[2], q.shape[3]), "batch, heads and head dim of q")
    if not MIN_HEAD_DIM <= q.shape[3] <= MAX_HEAD_DIM:
        raise ValueError(f"q has head dim {q.shape[3]}; expected {MIN_HEAD_DIM} to {MAX_HEAD_DIM}")


def check_attention_map(q: Tensor, k: Tensor, lse: Tensor) -> None:
    """Check ``q``, ``k`` and ``lse``, which together define the attention map."""
    check_query_key(q, k)
    check_tensor("lse", lse, "B H M", (score_dtype(q),), q.device)
    check_shape("lse", lse, tuple(q.shape[:3]), "batch, heads and queries of q")


def check_logits(lse: Tensor) -> None:
    """With ``ATEDM_CHECK=1``, check that no logit is so large that float32 misses the promised accuracy."""
    if lse.dtype == torch.float32 and os.environ.get("ATEDM_CHECK") == "1" and lse.device.type in ("cpu", "cuda"):
        largest = float(lse.abs().amax())
        if not largest <= MAX_LOGIT:
            raise ValueError(
                f"lse reaches {largest:g}; expected at most {MAX_LOGIT:g}, because float32 rounds larger logits too "
                "much: use smaller q and k, or another scale"
            )


def check_self_attention(q: Tensor, k: Tensor) -> None:
    if q.shape[2] != k.shape[2]:
        raise ValueError(
            f"k has {k.shape[2]} tokens; expected {q.shape[2]}, as in q: this op needs a self-attention map"
        )


def check_index(name: str, index: Tensor, batch: int, device: torch.device) -> None:
    """Check that ``index`` is int64 ``[B, K]``."""
    check_tensor(name, index, "B K", (torch.int64,), device)
    if index.shape[0] != batch:
        raise ValueError(f"{name} has batch size {index.shape[0]}; expected {batch}, as in the other tensors")


def check_index_values(name: str, index: Tensor, upper: int, meaning: str) -> None:
    """Check that the values are in ``[0, upper)``. This reads data, so fake kernels must not call it."""
    if values_are_checked(index):
        low, high = (int(v) for v in torch.aminmax(index))
        if low < 0 or high >= upper:
            raise ValueError(f"{name} holds values from {low} to {high}; expected 0 to {upper - 1} ({meaning})")


def check_ascending(name: str, index: Tensor) -> None:
    """Check that each row ascends, without repeats. This reads data, as :func:`check_index_values` does."""
    if values_are_checked(index):
        wrong = index[:, 1:] <= index[:, :-1]
        if wrong.any():
            row, slot = wrong.nonzero()[0].tolist()
            before, after = index[row, slot : slot + 2].tolist()
            raise ValueError(f"{name} holds {after} after {before} in row {row}; expected ascending values, no repeats")


def check_writable(name: str, written: Tensor) -> None:
    """Refuse a stride of 0, with which elements share memory. Other overlaps are not detected."""
    if any(stride == 0 and size > 1 for size, stride in zip(written.shape, written.stride(), strict=True)):
        raise ValueError(
            f"{name} has strides {tuple(written.stride())}; expected no stride of 0, because the op writes it in "
            "place: elements must not share memory"
        )


def check_memory_apart(name: str, read: Tensor, written_name: str, written: Tensor) -> None:
    """Check that ``read`` is outside the memory from the first to the last element of ``written``.

    Fake tensors have no memory, so fake kernels must not call this.
    """
    (read_begin, read_end), (written_begin, written_end) = _span(read), _span(written)
    if read_begin < written_end and written_begin < read_end:
        raise ValueError(
            f"{name} shares memory with {written_name}; expected memory of its own, because the op writes "
            f"{written_name} in place: pass {name}.clone()"
        )


def _span(tensor: Tensor) -> tuple[int, int]:
    """The first address of a tensor that is not empty, and the first one after its last element."""
    begin = tensor.data_ptr()
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return begin, begin + (last + 1) * tensor.element_size()


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float, torch.SymInt, torch.SymFloat)) and not isinstance(value, bool)


def check_integer(name: str, value: int, low: int, high: int | None = None) -> None:
    bound = f"at least {low}" if high is None else f"{low} to {high}"
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{name} is {value!r}; expected an integer, {bound}")
    if value < low or (high is not None and value > high):
        raise ValueError(f"{name} is {value}; expected {bound}")


def check_scale(scale: float | None) -> None:
    expected = "expected a finite number that float32 holds, or None for 1/sqrt(head dim)"
    if scale is not None and not _is_number(scale):
        raise TypeError(f"scale is {scale!r}; {expected}")
    if scale is not None and not -MAX_FLOAT32 <= scale <= MAX_FLOAT32:
        raise ValueError(f"scale is {scale}; {expected}")


def check_iteration(max_iterations: int, tolerance: float) -> None:
    check_integer("max_iterations", max_iterations, 1, MAX_COUNT)
    expected = "expected a number of at least 0 that float32 holds, or infinity"
    if not _is_number(tolerance):
        raise TypeError(f"tolerance is {tolerance!r}; {expected}")
    if not tolerance >= 0 or MAX_FLOAT32 < tolerance < math.inf:
        raise ValueError(f"tolerance is {tolerance}; {expected}")


def softmax_scale(q: Tensor, scale: float | None) -> float:
    return 1.0 / math.sqrt(q.shape[-1]) if scale is None else float(scale)


def score_dtype(q: Tensor) -> torch.dtype:
    """Dtype of scores and statistics: float32, but float64 for float64 inputs."""
    return torch.float64 if q.dtype == torch.float64 else torch.float32
