"""Stand-ins for diffusers' modules, so that the modules' own forwards compute a pruned block.

Each overrides a few attributes of a module and passes on all others. :class:`CompactTransformer` stands in for a
``Transformer2DModel``: the first layer chooses tokens, the layers run on them, and the output recovers the others.
:class:`RememberingTransformer` computes every token. :class:`_WithoutSelfAttention` stands in for the first layer, once
its self-attention has run.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

import atedm_kernels as kernels
from atedm.policy.attention_map import AttentionMap
from atedm.policy.recovery import Refill
from atedm.unet.attention import cross_attention_map, masks_of_kept, project_out, project_out_kept, self_attention
from atedm.unet.choosing import TokenChoice
from atedm.unet.gradients import refuse_gradients, require_gradients
from atedm.unet.memory import BlockMemory
from atedm_kernels.ops.gather_pair import gather_pair

if TYPE_CHECKING:
    from atedm.unet.block import PrunedBlock

# Keyword arguments for attention that mean the same for a subset of the tokens, or are converted so that they do.
_TOKENWISE_KWARGS = frozenset({"scale", "ip_adapter_masks"})


class RememberingTransformer:
    """Stand-in for a ``Transformer2DModel`` that computes every token and remembers what it adds to each."""

    def __init__(self, block: PrunedBlock, memory: BlockMemory) -> None:
        self._block = block
        self._module = block.module
        self._memory = memory

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_module"], name)

    def _get_output_for_continuous_inputs(self, *args: Any, **kwargs: Any) -> Tensor:
        return self._block.output(self, *args, **kwargs)

    def proj_out(self, x: Tensor) -> Tensor:
        """``[B, N, C]``, or ``[B, C, h, w]`` if the projection is a convolution."""
        projected = self._module.proj_out(x)
        if self._memory.update is not None:
            refuse_gradients(projected)
            tokens = projected.flatten(2).transpose(1, 2) if projected.ndim == 4 else projected
            self._memory.update.copy_(tokens.detach())
        return projected


class CompactTransformer:
    """Stand-in for a ``Transformer2DModel`` whose layers run on the kept tokens of one call.

    Args:
        choice: chooses the tokens, as early as the ranking allows. has_masks: whether the call may have masks of an
            IP-Adapter.
    """

    def __init__(self, block: PrunedBlock, choice: TokenChoice, memory: BlockMemory | None, has_masks: bool) -> None:
        self._block = block
        self._module = block.module
        self._choice = choice
        self._memory = memory
        self._has_masks = has_masks
        self._refill: Refill | None = None
        self._masks: list[Any] | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_module"], name)

    @property
    def transformer_blocks(self) -> list[Any]:
        _, *later = self._module.transformer_blocks
        if self._has_masks:
            later = [partial(self._later_layer, layer) for layer in later]
        return [self._first_layer, *later]

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
        _check_call(attention_mask, cross_attention_kwargs)
        index = None  # a ranking reads the queries of every token
        if block.ranking is None:
            self._choice.choose(None)
            index = self._choice.index
        attended, attention = self_attention(layer, hidden_states, index)

        def run_rest(attended: Tensor, tokens: Tensor, cross_attention_kwargs: dict[str, Any] | None) -> Tensor:
            return block.layer_forward(
                _WithoutSelfAttention(layer, attended),
                tokens,
                encoder_hidden_states=encoder_hidden_states,
                encoder_attention_mask=encoder_attention_mask,
                timestep=timestep,
                cross_attention_kwargs=cross_attention_kwargs,
                class_labels=class_labels,
            )

        by_cross_attention = block.ranking is not None and block.ranking.is_cross
        if not by_cross_attention:
            if block.ranking is not None:
                self._choice.choose(lambda: attention)
            self._find_refill(attention)
            if block.placement.is_early:
                # Cross-attention, feed-forward and output projection treat each token separately, and what they would
                # compute for a dropped token is never used.
                if block.ranking is None:
                    projected = project_out(layer.attn1, attended)
                    tokens = kernels.gather_tokens(hidden_states, self._choice.index)
                else:
                    projected, tokens = project_out_kept(layer.attn1, attended, hidden_states, self._choice.index)
                return run_rest(projected, tokens, self._for_kept(cross_attention_kwargs))
        attended = project_out(layer.attn1, attended)
        if by_cross_attention:
            if encoder_attention_mask is not None:
                raise ValueError("encoder_attention_mask is set; expected None with ranking='cross'")
            self._choice.choose(lambda: cross_attention_map(layer, attended + hidden_states, encoder_hidden_states))
            self._find_refill(attention)
            if block.placement.is_early:
                kept, tokens = gather_pair(attended, hidden_states, self._choice.index)
                return run_rest(kept, tokens, self._for_kept(cross_attention_kwargs))
        return kernels.gather_tokens(run_rest(attended, hidden_states, cross_attention_kwargs), self._choice.index)

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
        """Run an unchanged layer on the kept tokens."""
        return layer(
            hidden_states,
            attention_mask=attention_mask,
            encoder_hidden_states=encoder_hidden_states,
            encoder_attention_mask=encoder_attention_mask,
            timestep=timestep,
            cross_attention_kwargs=self._for_kept(cross_attention_kwargs),
            class_labels=class_labels,
        )

    def _find_refill(self, attention: AttentionMap) -> None:
        """Find what the dropped tokens get, once per call. ``attention``: the map of the self-attention."""
        if self._refill is not None:
            return
        update = None if self._memory is None else self._memory.update
        source = self._block.recovery.source(attention, self._choice.index)
        self._refill = Refill(self._choice.index, *self._choice.size, source, update)

    def _for_kept(self, kwargs: dict[str, Any] | None) -> dict[str, Any] | None:
        """Convert keyword arguments for attention on all tokens to arguments for the kept tokens."""
        if not kwargs or kwargs.get("ip_adapter_masks") is None:
            return kwargs
        masks = self._masks
        if masks is None:
            given, tokens = kwargs["ip_adapter_masks"], self._choice.size[0] * self._choice.size[1]
            masks = masks_of_kept(given, self._choice.index, tokens)
            # If a mask requires a gradient, a layer's checkpoint must compute it again, so it is not kept.
            if not require_gradients(given):
                self._masks = masks
        return {**kwargs, "ip_adapter_masks": masks}

    def _get_output_for_continuous_inputs(self, hidden_states: Tensor, residual: Tensor, **sizes: Any) -> Tensor:
        """Output projection and recovery. They commute, because the projection treats each token separately."""
        recovery = self._block.recovery
        compact = recovery.before_projection(hidden_states)
        if not self._block.placement.is_early:
            recovered = recovery.tokens(compact, self._refill)
            return self._block.output(self._module, recovered, residual, **sizes)
        projection = self._module.proj_out
        if self._module.use_linear_projection:
            compact = projection(compact)
        else:
            # A 1×1 convolution, over a map whose height is the number of tokens and whose width is 1.
            compact = projection(compact.transpose(1, 2)[..., None])[..., 0].transpose(1, 2)
        if recovery.remembers:
            refuse_gradients(compact, residual)
        return recovery.feature_map(compact, self._refill, residual)


def _check_call(attention_mask: Tensor | None, kwargs: dict[str, Any] | None) -> None:
    """Refuse arguments that :func:`atedm.apply` cannot check, because they come with the call."""
    if attention_mask is not None:
        raise ValueError("attention_mask is set; expected None: the ranking would have to know masked tokens")
    unknown = sorted(set(kwargs or ()) - _TOKENWISE_KWARGS)
    if unknown:
        raise ValueError(
            f"cross_attention_kwargs holds {', '.join(unknown)}; expected only {', '.join(_TOKENWISE_KWARGS)} "
            "on a pruned UNet: others may name positions of the full image"
        )


class _WithoutSelfAttention:
    """Stand-in for a ``BasicTransformerBlock`` whose self-attention has been computed: ``attended`` ``[B, M, C]``."""

    def __init__(self, layer: nn.Module, attended: Tensor) -> None:
        if not torch.compiler.is_compiling():
            # The forward reads twenty attributes, and `__getattr__` takes a microsecond for each. A graph reads once.
            own = {**vars(layer), **layer._modules}
            for name in ("norm1", "attn1"):
                own.pop(name, None)
            vars(self).update(own)
        self._layer = layer
        self._attended = attended

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_layer"], name)

    def norm1(self, hidden_states: Tensor) -> Tensor:
        return hidden_states

    def attn1(self, hidden_states: Tensor, **_: Any) -> Tensor:
        return self._attended
