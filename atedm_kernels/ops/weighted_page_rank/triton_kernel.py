"""PageRank of a self-attention map: every iteration recomputes the map, which is never stored."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from atedm_kernels._launch import Launch
from atedm_kernels.ops.attention_column_sums.triton_kernel import column_sums_launch, empty_partial_sums
from atedm_kernels.ops.triton_power_iteration import State, iterate, normalise_launch
from atedm_kernels.tiles import is_amd


def iteration_launches(q: Tensor, k: Tensor, lse: Tensor, state: State, scale: float, tolerance: float) -> list[Launch]:
    """The launches of one iteration. Running them again continues from ``state``."""
    parts = empty_partial_sums(q, k)
    if not is_amd(q.device):
        return [column_sums_launch(q, k, lse, parts, scale, state=state, tolerance=tolerance)]
    # On AMD, a barrier does not wait for the stores of other threads, so the last program might read old sums.
    return [column_sums_launch(q, k, lse, parts, scale, state=state), normalise_launch(parts, lse, state, tolerance)]


def weighted_page_rank_triton(*arguments: Any) -> tuple[Tensor, Tensor]:
    """``s ← Aᵀ s`` to its fixed point; arguments as in :func:`iterate`."""
    return iterate(iteration_launches, *arguments)
