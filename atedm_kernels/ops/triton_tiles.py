"""Tiles of queries and keys for the kernels that walk over an attention map."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from atedm_kernels._launch import next_power_of_2
from atedm_kernels.backends import triton_interprets

LOG2E = tl.constexpr(1.4426950408889634)

# The interpreter stores bfloat16 as integers and would multiply those. Widening the operands changes no product.
_WIDEN = tl.constexpr(triton_interprets())

# In elements: 16 bytes or more. Triton itself only detects strides divisible by 16, which excludes a head dim of 40.
_MAX_ALIGNMENT = 16

# tl.dot contracts over at least this many columns.
_MIN_DIM = 16


# float32 products run on the FMA units, with operands in registers, which hold no more columns than this.
_STREAMED_DIM = 32


def tile_constants(q: Tensor, k: Tensor) -> dict[str, object]:
    """Constants that describe how the head dim is split, and what divides the strides.

    For 16-bit inputs, the head dim is split into at most two powers of two (80 = 64 + 16), which costs less than
    padding. For float32, a loop runs over pieces of the head dim.
    """
    head_dim = q.shape[3]
    alignment = math.gcd(_MAX_ALIGNMENT, *q.stride()[:3], *k.stride()[:3])
    constants = {"HEAD_DIM": head_dim, "ALIGNMENT": alignment}
    if is_float32(q):
        piece = min(_STREAMED_DIM, max(_MIN_DIM, next_power_of_2(head_dim)))
        return {**constants, "DIM_A": piece, "DIM_B": 0, "STREAMED": True}
    first = max(_MIN_DIM, next_power_of_2(head_dim + 1) // 2)
    rest = max(0, head_dim - first)
    second = max(_MIN_DIM, next_power_of_2(rest)) if rest else 0
    if first + second >= next_power_of_2(head_dim):
        first, second = max(_MIN_DIM, next_power_of_2(head_dim)), 0
    return {**constants, "DIM_A": first, "DIM_B": second, "STREAMED": False}


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
def aligned(stride, ALIGNMENT: tl.constexpr):
    """The same stride, in a form that tells the compiler what divides it (a hint on a sum of pointers gets lost)."""
    return (stride // ALIGNMENT) * ALIGNMENT


@triton.jit
def head_pointer(pointer, pair, heads, stride_b, stride_h, ALIGNMENT: tl.constexpr):
    """Start of head ``pair`` (int64, batch · heads + head)."""
    return pointer + (pair // heads) * aligned(stride_b, ALIGNMENT) + (pair % heads) * aligned(stride_h, ALIGNMENT)


@triton.jit
def _load_piece(
    pointer,
    rows,
    mask,
    stride_n,
    stride_d,
    first,
    ALIGNMENT: tl.constexpr,
    DIM: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED: tl.constexpr,
):
    dims = first + tl.arange(0, DIM)
    mask = mask[:, None]
    if PADDED:
        mask = mask & (dims < HEAD_DIM)[None, :]
    offsets = (rows.to(tl.int64) * aligned(stride_n, ALIGNMENT))[:, None] + dims.to(tl.int64)[None, :] * stride_d
    return tl.load(pointer + offsets, mask=mask, other=0.0)


@triton.jit
def load_tile(
    pointer,
    rows,
    mask,
    stride_n,
    stride_d,
    ALIGNMENT: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM_A: tl.constexpr,
    DIM_B: tl.constexpr,
):
    """The rows of one head in two pieces along the head dim (the second is unused if ``DIM_B`` is 0).

    Masked rows, and columns past the head dim, are 0.
    """
    first = _load_piece(pointer, rows, mask, stride_n, stride_d, 0, ALIGNMENT, DIM_A, HEAD_DIM, DIM_A > HEAD_DIM)
    second = first
    if DIM_B > 0:
        second = _load_piece(
            pointer, rows, mask, stride_n, stride_d, DIM_A, ALIGNMENT, DIM_B, HEAD_DIM, DIM_A + DIM_B > HEAD_DIM
        )
    return first, second


@triton.jit
def products(a, a_second, b, b_second, DIM_B: tl.constexpr):
    """``a bᵀ`` of 16-bit tiles, in float32."""
    if _WIDEN:
        a, a_second, b, b_second = a.to(tl.float32), a_second.to(tl.float32), b.to(tl.float32), b_second.to(tl.float32)
    out = tl.dot(a, tl.trans(b))
    if DIM_B > 0:
        out = tl.dot(a_second, tl.trans(b_second), out)
    return out


@triton.jit
def streamed_products(
    a,
    a_rows,
    a_mask,
    a_stride_n,
    a_stride_d,
    b,
    b_rows,
    b_mask,
    b_stride_n,
    b_stride_d,
    ALIGNMENT: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
):
    """``a bᵀ`` of float32 rows, without rounding to tf32. Both are read piece by piece along the head dim."""
    out = tl.zeros([a_rows.shape[0], b_rows.shape[0]], tl.float32)
    for first in tl.range(0, HEAD_DIM, DIM):
        a_piece = _load_piece(
            a, a_rows, a_mask, a_stride_n, a_stride_d, first, ALIGNMENT, DIM, HEAD_DIM, HEAD_DIM % DIM != 0
        )
        b_piece = _load_piece(
            b, b_rows, b_mask, b_stride_n, b_stride_d, first, ALIGNMENT, DIM, HEAD_DIM, HEAD_DIM % DIM != 0
        )
        out = tl.dot(a_piece, tl.trans(b_piece), out, input_precision="ieee")
    return out
