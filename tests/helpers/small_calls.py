"""Runs every op on small awkward shapes, for a memory checker.

``compute-sanitizer python -m tests.helpers.small_calls [cpu]``.
"""

from __future__ import annotations

import sys

import torch

import atedm_kernels as ops
from atedm_kernels.ops.gather_pair import gather_pair
from atedm_kernels.ops.sum_rows import sum_rows
from atedm_kernels.ops.token_drift import token_drift

# B, H, N, D, kept tokens. The last shape has more tokens than any kernel takes in one step.
SHAPES = [
    (1, 1, 1, 8, 1),
    (2, 3, 37, 40, 11),
    (1, 2, 130, 64, 130),
    (2, 2, 199, 80, 1),
    (1, 1, 257, 160, 100),
    (1, 1, 9001, 16, 3000),
]


def call_all(device: torch.device, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    batch, heads, tokens, head_dim, keep = shape
    generator = torch.Generator(device).manual_seed(0)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator, device=device).to(dtype)

    q, k, v = (normal(batch, tokens, heads, head_dim).transpose(1, 2) for _ in range(3))
    _, lse = ops.attention_with_logsumexp(q, k, v)
    scores, _ = ops.weighted_page_rank(q, k, lse)
    ops.weighted_page_rank_cross(q, k, lse)
    ops.attention_column_sums(q, k, lse, scores)
    index = ops.select_tokens(scores, keep)
    source = ops.similarity_source(q, k, lse, index)
    compact = ops.gather_tokens(normal(batch, tokens, heads * head_dim), index)
    gather_pair(normal(batch, tokens, 3), normal(batch, tokens, heads * head_dim), index)
    sum_rows(ops.recover_tokens(compact, source), source, keep)
    residual, cache = normal(batch, heads * head_dim, 1, tokens), normal(batch, tokens, heads * head_dim)
    projection, seen = normal(4, heads * head_dim), normal(batch, 4, tokens)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        token_drift(residual.to(memory_format=memory_format), projection, seen)
        ops.recover_feature_map(compact, source, residual.to(memory_format=memory_format))
        ops.update_feature_map(compact, index, cache, residual.to(memory_format=memory_format))


if __name__ == "__main__":
    place = torch.device(sys.argv[1] if len(sys.argv) > 1 else "cuda")
    for one in SHAPES:
        for kind in (torch.float16, torch.bfloat16, torch.float32):
            call_all(place, one, kind)
    if place.type == "cuda":
        torch.cuda.synchronize()
    print(f"{3 * len(SHAPES)} shapes and dtypes ran on {place}")
