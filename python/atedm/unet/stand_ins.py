"""Stand-ins for diffusers' modules: what a pruned block computes, by the modules' own forwards.

Each answers for a few attributes of a module and passes every other one on. :class:`CompactTransformer` stands in for
a ``Transformer2DModel``: its first layer chooses tokens, the layers run on those, its output recovers the others.
:class:`RememberingTransformer` computes every token. :class:`_WithoutSelfAttention` stands in for the first layer,
whose self-attention has run by then.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

import atedm_kernels as kernels
from atedm.policy.attention_map import AttentionMap
from atedm.policy.recovery import Refill
from atedm.policy.selection import grid_first
from atedm.unet.attention import masks_of_kept, project, project_cross, project_out, scale_of
from atedm.unet.blocks import PERTURBING_PROCESSORS
from atedm.unet.calls import Call
from atedm.unet.memory import BlockMemory
from atedm.unet.recording import Ranked
from atedm_kernels.ops.select_tokens import join_heads

if TYPE_CHECKING:
    from atedm.unet.block import PrunedBlock

# Keyword arguments for attention that are known to mean the same for a subset of the tokens, or are made to.
_TOKENWISE_KWARGS = frozenset({"scale", "ip_adapter_masks"})


class RememberingTransformer:
    """Stand-in for a ``Transformer2DModel`` that computes every token and remembers what it adds to each.

    Attributes:
        index: None, for all tokens. observed: None, as nothing is chosen.
    """

    index = observed = None

    def __init__(self, block: PrunedBlock, memory: BlockMemory) -> None:
        self._block = block
        self._module = block.module
        self._memory = memory

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_module"], name)

    def _get_output_for_continuous_inputs(self, *args: Any, **kwargs: Any) -> Tensor:
        return self._block.output(self, *args, **kwargs)

    def proj_out(self, x: Tensor) -> Tensor:
        """``[B, N, C]``, or ``[B, C, h, w]`` where the projection is a convolution."""
        projected = self._module.proj_out(x)
        if self._memory.update is not None:
            tokens = projected.flatten(2).transpose(1, 2) if projected.ndim == 4 else projected
            self._memory.update.copy_(tokens.detach())
        return projected


class CompactTransformer:
    """Stand-in for a ``Transformer2DModel`` whose layers run on the kept tokens of one call.

    Attributes:
        index: int64 ``[B, K]``, the kept tokens, once they are chosen. observed: what the staleness saw of the input.
    """

    def __init__(
        self, block: PrunedBlock, call: Call, memory: BlockMemory | None, keep: int, hidden_states: Tensor
    ) -> None:
        self._block = block
        self._call = call
        self._module = block.module
        self._memory = memory
        self._keep = keep
        self._size = tuple(hidden_states.shape[-2:])
        self.index: Tensor | None = None
        self.observed: Tensor | None = None
        if block.staleness is not None:
            self.observed = block.staleness.observe(hidden_states.detach(), memory.staleness)
        self._refill: Refill | None = None
        self._masks: list[Any] | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_module"], name)

    @property
    def transformer_blocks(self) -> list[Any]:
        later = self._module.transformer_blocks[1:]
        return [self._first_layer, *(partial(self._later_layer, layer) for layer in later)]

    def _first_layer(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        timestep: Tensor | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        class_labels: Tensor | None = None,
    ) -> Tensor:
        """Self-attention on every token, ranking, and the rest of the layer: ``[B, N, C]`` → ``[B, K, C]``."""
        block, layer = self._block, self._module.transformer_blocks[0]
        self._check_call(layer, attention_mask, cross_attention_kwargs)
        if block.ranking is None:
            self._choose(None)
        attended, attention = self._attend(layer, hidden_states)

        def run_rest(tokens: Tensor, cross_attention_kwargs: dict[str, Any] | None) -> Tensor:
            return block.layer_forward(
                _WithoutSelfAttention(layer),
                tokens,
                encoder_hidden_states=encoder_hidden_states,
                encoder_attention_mask=encoder_attention_mask,
                timestep=timestep,
                cross_attention_kwargs=cross_attention_kwargs,
                class_labels=class_labels,
            )

        by_cross_attention = block.ranking is not None and block.ranking.attention == "cross"
        early = block.calls.options.placement == "early"
        if not by_cross_attention:
            if block.ranking is not None:
                self._choose(lambda: attention)
            self._find_refill(attention)
            if early:
                # Cross-attention, feed-forward and output projection treat each token on its own: what they would
                # compute for a dropped token is never used.
                kept = attended if block.ranking is None else kernels.gather_tokens(attended, self.index)
                tokens = project_out(layer.attn1, kept) + kernels.gather_tokens(hidden_states, self.index)
                return run_rest(tokens, self._for_kept(cross_attention_kwargs))
        hidden_states = project_out(layer.attn1, attended) + hidden_states
        if by_cross_attention:
            if encoder_attention_mask is not None:
                raise ValueError("encoder_attention_mask is set; expected None with ranking='cross'")
            self._choose(lambda: _cross_attention_map(layer, hidden_states, encoder_hidden_states))
            self._find_refill(attention)
            if early:
                tokens = kernels.gather_tokens(hidden_states, self.index)
                return run_rest(tokens, self._for_kept(cross_attention_kwargs))
        return kernels.gather_tokens(run_rest(hidden_states, cross_attention_kwargs), self.index)

    def _later_layer(
        self,
        layer: nn.Module,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        timestep: Tensor | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        class_labels: Tensor | None = None,
    ) -> Tensor:
        """A layer as it is, on the kept tokens."""
        return layer(
            hidden_states,
            attention_mask=attention_mask,
            encoder_hidden_states=encoder_hidden_states,
            encoder_attention_mask=encoder_attention_mask,
            timestep=timestep,
            cross_attention_kwargs=self._for_kept(cross_attention_kwargs),
            class_labels=class_labels,
        )

    def _attend(self, layer: nn.Module, hidden_states: Tensor) -> tuple[Tensor, AttentionMap]:
        """Self-attention of the first layer before its output projection ``[B, M, H·D]``, and its map.

        The queries are those of all tokens, or of the kept ones where they have been chosen by now.
        """
        attention, index = layer.attn1, self.index
        q, k, v = project(attention, layer.norm1(hidden_states), index)
        scale = scale_of(attention)
        attended, lse = kernels.attention_with_logsumexp(q, k, v, scale=scale)
        parts = PERTURBING_PROCESSORS.get(type(attention.processor).__name__)
        if parts is not None:
            # The ranking is that of the map as it would be.
            own = v[-(v.shape[0] // parts) :]
            if index is not None:
                at = index[-own.shape[0] :, None, :, None].expand(-1, own.shape[1], -1, own.shape[3])
                own = own.gather(2, at)
            attended = torch.cat([attended[: -own.shape[0]], own])
        return attended.transpose(1, 2).flatten(2), AttentionMap(q, k, lse, scale)

    def _choose(self, attention: Callable[[], AttentionMap] | None) -> None:
        """Choose the kept tokens, or keep an earlier choice.

        Args:
            attention: makes the map that the ranking reads; None without a ranking.
        """
        memory, iterations = self._memory, None
        if self._is_chosen_before():
            self.index, scores = memory.index, memory.scores
        else:
            scores, iterations = self._scores(attention)
            self.index = self._select(scores)
            if memory is not None and memory.index is not None:
                memory.index.copy_(self.index)
                picture = self._call.picture
                if not torch.compiler.is_compiling() and picture is not None:
                    memory.scores, memory.choice = scores, picture.chosen
        if self._call.recordings:
            self._record(scores, iterations)

    def _is_chosen_before(self) -> bool:
        memory, call = self._memory, self._call
        if call.ranks or memory is None or memory.index is None:
            return False
        # A block may have been skipped when the choice was due. In a graph none is.
        return torch.compiler.is_compiling() or memory.choice == call.picture.chosen

    def _scores(self, attention: Callable[[], AttentionMap] | None) -> tuple[Tensor, Tensor | None]:
        """Scores ``[B, H, N]``, and the iterations of a ranking that iterates."""
        block, scores, iterations = self._block, None, None
        if attention is not None:
            scores, iterations = block.ranking.scores(attention())
        if block.staleness is not None:
            stale = block.staleness.scores(self.observed, self._memory.staleness)
            scores = stale if scores is None else scores * stale
        return scores, iterations

    def _find_refill(self, attention: AttentionMap) -> None:
        """Find what the dropped tokens get; ``attention`` is that of the self-attention."""
        update = None if self._memory is None else self._memory.update
        source = self._block.recovery.source(attention, self.index)
        self._refill = Refill(self.index, *self._size, source, update)

    def _select(self, scores: Tensor) -> Tensor:
        options = self._block.calls.options
        if options.grid is not None:
            scores = grid_first(scores, *self._size, options.grid, self._keep)
        if torch.compiler.is_compiling():
            return kernels.select_tokens(scores, self._keep, reduction=options.reduction)
        try:
            return kernels.select_tokens(scores, self._keep, reduction=options.reduction)
        except ValueError as error:
            pictures = scores.isnan().any(dim=2).any(dim=1).nonzero().flatten().tolist()
            if not pictures:
                raise
            step = "an unknown step" if self._call.step is None else f"step {self._call.step}"
            raise ValueError(
                f"{self._block.name} ranks NaN in row {', '.join(map(str, pictures))} of the batch, at {step}; "
                "expected numbers: look at the latent and the prompt of that picture, and at the dtype"
            ) from error

    def _record(self, scores: Tensor, iterations: Tensor | None) -> None:
        scores = join_heads(scores.cpu(), self._block.calls.options.reduction).float()
        index, iterations = self.index.cpu().clone(), None if iterations is None else iterations.cpu()
        for recording, number in self._call.recordings:
            place = (number, self._call.step, self._block.name, self._block.level, *self._size)
            recording.ranked.append(Ranked(*place, scores, index, iterations))

    def _for_kept(self, kwargs: dict[str, Any] | None) -> dict[str, Any] | None:
        """Keyword arguments for attention on the kept tokens, from those for all."""
        if not kwargs or kwargs.get("ip_adapter_masks") is None:
            return kwargs
        if self._masks is None:
            tokens = self._size[0] * self._size[1]
            self._masks = masks_of_kept(kwargs["ip_adapter_masks"], self.index, tokens)
        return {**kwargs, "ip_adapter_masks": self._masks}

    def _check_call(self, layer: nn.Module, attention_mask: Tensor | None, kwargs: dict[str, Any] | None) -> None:
        """Refuse what :func:`atedm.apply` cannot see: it depends on the call, or has changed since."""
        if attention_mask is not None:
            raise ValueError("attention_mask is set; expected None: the ranking would have to know masked tokens")
        unknown = sorted(set(kwargs or ()) - _TOKENWISE_KWARGS)
        if unknown:
            raise ValueError(
                f"cross_attention_kwargs holds {', '.join(unknown)}; expected none but {', '.join(_TOKENWISE_KWARGS)} "
                "on a pruned UNet: others may name positions of the full image"
            )
        if not torch.compiler.is_compiling():  # else checked outside of the graph
            self._block.check_unchanged()

    def _get_output_for_continuous_inputs(self, hidden_states: Tensor, residual: Tensor, **sizes: Any) -> Tensor:
        """Output projection and recovery, which commute: the projection treats each token on its own."""
        recovery = self._block.recovery
        compact = recovery.before_projection(hidden_states)
        if self._block.calls.options.placement == "paper":
            recovered = recovery.tokens(compact, self._refill)
            return self._block.output(self._module, recovered, residual, **sizes)
        projection = self._module.proj_out
        if self._module.use_linear_projection:
            compact = projection(compact)
        else:
            # A 1×1 convolution over a map as high as there are tokens, and 1 wide.
            compact = projection(compact.transpose(1, 2)[..., None])[..., 0].transpose(1, 2)
        return recovery.feature_map(compact, self._refill, residual)


def _cross_attention_map(layer: nn.Module, hidden_states: Tensor, text: Any) -> AttentionMap:
    attention = layer.attn2
    if isinstance(text, tuple):  # an IP-Adapter's (text, images)
        text = text[0]
    q, k = project_cross(attention, layer.norm2(hidden_states), text)
    scale = scale_of(attention)
    # Only the logsumexp is wanted, so the keys stand in for the values.
    _, lse = kernels.attention_with_logsumexp(q, k, k, scale=scale)
    return AttentionMap(q, k, lse, scale)


class _WithoutSelfAttention:
    """Stand-in for a ``BasicTransformerBlock`` whose input already holds its self-attention."""

    def __init__(self, layer: nn.Module) -> None:
        self._layer = layer

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_layer"], name)

    def norm1(self, hidden_states: Tensor) -> Tensor:
        return hidden_states

    def attn1(self, hidden_states: Tensor, **_: Any) -> Tensor:
        return hidden_states.new_zeros(())
