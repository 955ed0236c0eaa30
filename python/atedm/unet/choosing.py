"""Choose the tokens that a block keeps in one call: those with the highest scores from its ranking and staleness."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import atedm_kernels as kernels
from atedm.policy.attention_map import AttentionMap
from atedm.policy.selection import grid_first
from atedm.unet.errors import RankedNaN
from atedm.unet.memory import BlockMemory
from atedm.unet.planner import Call
from atedm.unet.recording import Ranked
from atedm_kernels.ops.select_tokens import join_heads

if TYPE_CHECKING:
    from atedm.unet.block import PrunedBlock


class TokenChoice:
    """The tokens that ``block`` keeps of the feature map ``hidden_states`` ``[B, C, h, w]`` in one call.

    Attributes:
        size: ``(h, w)``. keep: number of kept tokens, K.
        index: int64 ``[B, K]``, the kept tokens, ascending; None until they are chosen.
        observed: what the block's staleness has read from the feature map; None without a staleness.
    """

    def __init__(
        self, block: PrunedBlock, call: Call, memory: BlockMemory | None, keep: int, hidden_states: Tensor
    ) -> None:
        self._block = block
        self._call = call
        self._memory = memory
        self.keep = keep
        self.size = tuple(hidden_states.shape[-2:])
        self.index: Tensor | None = None
        self.observed: Any = None
        self._random: tuple[Tensor, Tensor | None] | None = None
        if block.staleness is not None:
            self.observed = block.staleness.observe(hidden_states.detach(), memory.staleness)

    def choose(self, attention: Callable[[], AttentionMap] | None) -> None:
        """Choose the kept tokens, or keep an earlier choice.

        Does nothing the second time in a call, when a checkpoint computes again.

        Args:
            attention: makes the map that the ranking reads; None without a ranking.
        """
        if self.index is not None:
            self._follow_random_numbers()
            return
        memory, call, iterations = self._memory, self._call, None
        if self._is_chosen_before():
            self.index, scores = memory.index, memory.scores
        else:
            ranks, iterations = (None, None) if attention is None else self._rank(attention())
            scores = self._scores(ranks)
            self.index = self._select(scores)
            if memory is not None and memory.ranks is not None:
                memory.ranks.copy_(ranks)
            if memory is not None and memory.index is not None:
                memory.index.copy_(self.index)
                memory.scores = None if torch.compiler.is_compiling() else scores
                memory.has_chosen = True  # not the step: torch would guard a graph by it
        if call.recordings:
            self._record(scores, iterations)
        if self._block.module.gradient_checkpointing and not torch.compiler.is_compiling():
            device = self.index.device
            self._random = torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    def _follow_random_numbers(self) -> None:
        """A checkpoint that runs again draws the numbers after the choice as its first run did, such as a dropout's."""
        if self._random is not None:
            of_cpu, of_gpu = self._random
            torch.set_rng_state(of_cpu)
            if of_gpu is not None:
                torch.cuda.set_rng_state(of_gpu, self.index.device)

    def _is_chosen_before(self) -> bool:
        # A block may have been left out when the choice was due.
        memory = self._memory
        return not self._call.ranks and memory is not None and memory.index is not None and memory.serves

    def _rank(self, attention: AttentionMap) -> tuple[Tensor, Tensor | None]:
        """The scores of the ranking, ``[B, H, N]``, and its iterations; None if it does not iterate."""
        initial = self._memory.ranks if self._call.is_warm and self._memory is not None else None
        return self._block.ranking.scores(attention, initial)

    def _scores(self, ranks: Tensor | None) -> Tensor:
        """``[B, H, N]``: the ranking's scores times those of the staleness."""
        block = self._block
        if block.staleness is None:
            return ranks
        stale = block.staleness.scores(self.observed, self._memory.staleness)
        return stale if ranks is None else ranks * stale

    def _select(self, scores: Tensor) -> Tensor:
        options = self._block.calls.options
        if options.grid is not None:
            scores = grid_first(scores, *self.size, options.grid, self.keep)
        if torch.compiler.is_compiling():
            return kernels.select_tokens(scores, self.keep, reduction=options.reduction)
        try:
            return kernels.select_tokens(scores, self.keep, reduction=options.reduction)
        except ValueError as error:
            rows = scores.isnan().any(dim=2).any(dim=1).nonzero().flatten().tolist()
            if not rows:
                raise
            raise RankedNaN(self._block.name, self._call.step, rows, scores.shape[0]) from error

    def _record(self, scores: Tensor | None, iterations: Tensor | None) -> None:
        if scores is None:
            height, width = self.size
            scores = torch.full((self.index.shape[0], height * width), torch.nan)
        else:
            scores = join_heads(scores.cpu(), self._block.calls.options.reduction).float()
        index, iterations = self.index.cpu().clone(), None if iterations is None else iterations.cpu()
        for recording, number in self._call.recordings:
            place = (number, self._call.step, self._block.name, self._block.level, *self.size)
            recording.ranked.append(Ranked(*place, scores, index, iterations))
