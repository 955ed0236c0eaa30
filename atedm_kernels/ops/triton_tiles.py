"""Tiles of queries and keys for the kernels that walk over an attention map."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from atedm_kernels._launch import next_power_of_2

LOG2E = tl.constexpr(1.4426950408889634)

# tl.dot contracts over at least this many columns.
_LEAST_DIM = 16


def head_dim_pieces(head_dim: int) -> dict[str, int]:
    """Constants that cut a head dim into at most two powers of two (80 = 64 + 16), which costs less than padding it."""
    first = max(_LEAST_DIM, next_power_of_2(head_dim + 1) // 2)
    rest = max(0, head_dim - first)
    second = max(_LEAST_DIM, next_power_of_2(rest)) if rest else 0
    if first + second >= next_power_of_2(head_dim):
        first, second = max(_LEAST_DIM, next_power_of_2(head_dim)), 0
    return {"HEAD_DIM": head_dim, "DIM_A": first, "DIM_B": second}


def query_key_arguments(q: Tensor, k: Tensor) -> dict[str, object]:
    """The tensors and strides that :func:`head_pointer` and :func:`load_tile` read."""
    arguments: dict[str, object] = {"q": q, "k": k, "heads": q.shape[1]}
    for name, x in (("q", q), ("k", k)):
        for dim, stride in zip("bhnd", x.stride(), strict=True):
            arguments[f"{name}_stride_{dim}"] = stride
    return arguments


def is_float32(x: Tensor) -> bool:
    return x.dtype == torch.float32


@triton.jit
def head_pointer(pointer, pair, heads, stride_b, stride_h):
    """Start of head ``pair`` (int64, batch · heads + head)."""
    return pointer + (pair // heads) * stride_b + (pair % heads) * stride_h


@triton.jit
def _load_piece(pointer, rows, mask, stride_n, stride_d, HEAD_DIM: tl.constexpr, FIRST: tl.constexpr, DIM: tl.constexpr):
    dims = FIRST + tl.arange(0, DIM)
    mask = mask[:, None]
    if FIRST + DIM > HEAD_DIM:
        mask = mask & (dims < HEAD_DIM)[None, :]
    offsets = rows.to(tl.int64)[:, None] * stride_n + dims.to(tl.int64)[None, :] * stride_d
    return tl.load(pointer + offsets, mask=mask, other=0.0)


@triton.jit
def load_tile(
    pointer,
    rows,
    mask,
    stride_n,
    stride_d,
    HEAD_DIM: tl.constexpr,
    DIM_A: tl.constexpr,
    DIM_B: tl.constexpr,
):
    """The rows of one head in two pieces along the head dim (the second is unused where ``DIM_B`` is 0).

    Masked rows, and columns past the head dim, are 0.
    """
    first = _load_piece(pointer, rows, mask, stride_n, stride_d, HEAD_DIM, 0, DIM_A)
    second = first
    if DIM_B > 0:
        second = _load_piece(pointer, rows, mask, stride_n, stride_d, HEAD_DIM, DIM_A, DIM_B)
    return first, second


@triton.jit
def products(a, a_second, b, b_second, DIM_B: tl.constexpr):
    """``a bᵀ`` in float32. ``ieee`` concerns float32 inputs alone: no rounding to tf32."""
    out = tl.dot(a, tl.trans(b), input_precision="ieee")
    if DIM_B > 0:
        out = tl.dot(a_second, tl.trans(b_second), out, input_precision="ieee")
    return out
