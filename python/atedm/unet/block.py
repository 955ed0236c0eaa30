"""A pruned attention block: what its ``forward`` runs in a call, and what it remembers of a picture.

No code of diffusers' forwards is copied. A block's own forward runs with a stand-in for ``self``, see
:mod:`atedm.unet.stand_ins`. The stand-in holds all state of the call, so an exception leaves nothing behind.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from atedm.policy.placement import PLACEMENTS
from atedm.policy.ranking import make_ranking
from atedm.policy.recovery import RECOVERIES
from atedm.policy.selection import kept_tokens
from atedm.policy.staleness import STALENESS
from atedm.unet.blocks import Place, feature_map_size
from atedm.unet.calls import UNetCalls
from atedm.unet.choosing import TokenChoice
from atedm.unet.memory import BlockMemory, Slot
from atedm.unet.planner import Call
from atedm.unet.stand_ins import CompactTransformer, RememberingTransformer


class PrunedBlock:
    """The ``forward`` of a pruned ``Transformer2DModel`` instance.

    Attributes:
        placement, ranking, recovery, staleness: the policies that the options name; ``ranking`` or ``staleness`` may be
            None.
        remembers: whether the policies need what an earlier call computed.
    """

    runs_when_reused = False

    def __init__(
        self,
        name: str,
        module: nn.Module,
        place: Place,
        level: int,
        whole_when_light: bool,
        calls: UNetCalls,
    ) -> None:
        self.name = name
        self.module = module
        self.place = place
        self.level = level
        self.whole_when_light = whole_when_light
        self.calls = calls
        options = calls.options
        self.placement = PLACEMENTS[options.placement]
        self.ranking = make_ranking(options.ranking, options.max_iterations, options.tolerance)
        self.recovery = RECOVERIES[options.recovery]
        self.staleness = None if options.staleness is None else STALENESS[options.staleness]()
        self.remembers = self.recovery.remembers or self.staleness is not None
        # Looked up here, because torch.compile cannot look them up on diffusers' classes while it traces.
        self.forward = type(module).forward
        self.output = type(module)._get_output_for_continuous_inputs
        self.layer_forward = type(module.transformer_blocks[0]).forward
        # The forward that another tool left on the instance; it is restored when pruning is removed.
        self.previous: Any = None

    @property
    def is_current(self) -> bool:
        """Whether the forwards that were looked up are still those of the module's class."""
        kind, layer = type(self.module), type(self.module.transformer_blocks[0])
        looked_up = (self.forward, self.output, self.layer_forward)
        return looked_up == (kind.forward, kind._get_output_for_continuous_inputs, layer.forward)

    def count_kept(self, height: int, width: int) -> int:
        """Number of tokens of a feature map that are kept. If all are, log a warning once."""
        options = self.calls.options
        keep = kept_tokens(height * width, options.ratio_at(self.level), options.keep_multiple)
        if keep == height * width:
            self.calls.say_once(
                "nothing is pruned",
                "%s: ratio=%s and keep_multiple=%d keep all of its %d tokens, so nothing is pruned there at this size",
                self.name,
                options.ratio,
                options.keep_multiple,
                keep,
            )
        return keep

    def start(self, slot: Slot, sample: Tensor, dtype: torch.dtype) -> None:
        """Make room in ``slot`` for what the block remembers of a picture with ``sample`` ``[B, 4, h, w]``."""
        size = feature_map_size(self.level, *sample.shape[2:])
        batch, tokens, device = sample.shape[0], size[0] * size[1], sample.device
        keep = self.count_kept(*size)
        if keep == tokens:
            return
        memory = slot.blocks[self.name] = BlockMemory((batch, *size))
        if self.calls.options.rank_every > 1:
            memory.index = torch.zeros(batch, keep, dtype=torch.int64, device=device)
        if self.calls.options.starts_warm:
            first = self.module.transformer_blocks[0]
            heads = (first.attn2 if self.ranking.is_cross else first.attn1).heads
            precise = torch.promote_types(dtype, torch.float32)
            memory.ranks = torch.ones(batch, heads, tokens, dtype=precise, device=device)
        if self.recovery.remembers:
            memory.update = torch.zeros(batch, tokens, self.module.out_channels, dtype=dtype, device=device)
        if self.staleness is not None:
            memory.staleness = self.staleness.start((batch, tokens, self.module.in_channels), dtype, device)

    def memory_of(self, call: Call, hidden_states: Tensor) -> BlockMemory | None:
        """What is remembered of the picture of ``call``; None if nothing of this shape is."""
        memory = None if call.slot is None else call.slot.blocks.get(self.name)
        batch, _, height, width = hidden_states.shape
        return memory if memory is not None and memory.size == (batch, height, width) else None

    def __call__(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        height, width = hidden_states.shape[-2:]
        keep = self.count_kept(height, width)
        call = self.calls.current()
        memory = self.memory_of(call, hidden_states)
        is_whole = call.kind in ("whole", "reused") or (call.kind == "light" and self.whole_when_light)
        has_no_memory = self.remembers and memory is None
        if not is_whole and self.remembers and memory is not None:
            # A wrapper may have skipped the block in the picture's first call. Asked only here, so that torch does not
            # guard the graph of a whole call by it.
            is_whole = not memory.is_filled
        choice = None
        if keep == height * width or is_whole or has_no_memory:
            if has_no_memory or not self.remembers:
                return self.forward(self.module, hidden_states, *args, **kwargs)
            stand_in = RememberingTransformer(self, memory)
            memory.is_filled = True
        else:
            # Masks for all tokens do not fit the kept ones. diffusers passes them as keywords.
            has_masks = bool(args) or "ip_adapter_masks" in (kwargs.get("cross_attention_kwargs") or ())
            choice = TokenChoice(self, call, memory, keep, hidden_states)
            stand_in = CompactTransformer(self, choice, memory, has_masks)
        output = self.forward(stand_in, hidden_states, *args, **kwargs)
        if self.staleness is not None:
            if choice is None:
                observed, index = self.staleness.observe(hidden_states.detach(), memory.staleness), None
            else:
                observed, index = choice.observed, choice.index
            self.staleness.computed(observed, memory.staleness, index)
        return output
