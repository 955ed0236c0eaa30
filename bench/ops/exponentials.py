"""A kernel that computes only exponentials, to measure a GPU's rate."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_BLOCK = 1024
# Independent chains hide the latency of the special function units.
_CHAINS = 8


@triton.jit
def _exp2_kernel(x, out, steps, CHAINS: tl.constexpr, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * CHAINS * BLOCK + tl.arange(0, CHAINS * BLOCK)
    value = tl.load(x + offsets)
    for _ in range(0, steps):
        # 2^-x has a fixed point near 0.64, so values stay normal numbers.
        value = tl.exp2(-value)
    tl.store(out + offsets, value)


def repeated_exp2(x: torch.Tensor, steps: int) -> torch.Tensor:
    """Apply ``x ← 2^-x`` ``steps`` times. ``x``: float32, with a length that is a multiple of 8192."""
    out = torch.empty_like(x)
    _exp2_kernel[(x.numel() // (_CHAINS * _BLOCK),)](x, out, steps, CHAINS=_CHAINS, BLOCK=_BLOCK, num_warps=8)
    return out
