"""Which kept token refills each position (AT-EDM, section 3.3) in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from atedm_kernels.ops.attention_map import BLOCK_ELEMENTS, log_map_blocks


def similarity_source_reference(q: Tensor, k: Tensor, lse: Tensor, index: Tensor, scale: float) -> Tensor:
    """``argmax_j mean_h A[index[j], i]``; a kept token takes its own slot; shapes as in the public op."""
    batch, tokens = q.shape[0], q.shape[2]
    keep = index.shape[1]
    index = index.clamp(0, tokens - 1)
    slots = torch.arange(keep, device=q.device)[:, None]
    source = torch.empty(batch, tokens, dtype=torch.int64, device=q.device)
    # So few columns that a block holds every kept token: log_map_blocks then splits only the heads.
    columns_per_block = max(1, BLOCK_ELEMENTS // keep)
    for b in range(batch):
        queries, shift = q[b].index_select(1, index[b]), lse[b].index_select(1, index[b])
        for n in range(0, tokens, columns_per_block):
            columns = slice(n, min(n + columns_per_block, tokens))
            similarity = 0.0
            for _, _, log_block in log_map_blocks(queries, k[b, :, columns], shift, scale):
                similarity = similarity + log_block.exp_().sum(dim=0)
            similarity = similarity.masked_fill(similarity.isnan(), -1.0)
            best = similarity.amax(dim=0)
            # Take the lowest slot: argmax promises no order among ties.
            source[b, columns] = torch.where(similarity == best, slots, keep).amin(dim=0)
        source[b, index[b]] = slots[:, 0]
    return source
