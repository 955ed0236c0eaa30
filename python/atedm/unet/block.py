"""What a pruned attention block computes: choose tokens, compute the kept ones, recover the others.

Nothing of diffusers' forwards is copied. A block's own forward runs with a stand-in for ``self`` that answers for a
few attributes and passes every other one on: :class:`_CompactTransformer` for the ``Transformer2DModel`` (its first
layer prunes, its output recovers), :class:`_WithoutSelfAttention` for the first layer, whose self-attention has run
by then. All state of a call lives in its stand-ins, so an exception leaves nothing behind.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import atedm_kernels as kernels
from atedm.policy.attention_map import AttentionMap
from atedm.policy.ranking import make_ranking
from atedm.policy.recovery import RECOVERIES, Refill
from atedm.policy.selection import grid_first, kept_tokens
from atedm.unet.attention import masks_of_kept, project, project_cross, project_out, scale_of
from atedm.unet.blocks import PERTURBING_PROCESSORS, why_hooked, why_not_plain, why_not_tokenwise
from atedm.unet.calls import Call, UNetCalls
from atedm.unet.memory import Kept
from atedm.unet.recording import Ranked
from atedm_kernels.ops.select_tokens import join_heads

# Keyword arguments for attention that are known to mean the same for a subset of the tokens, or are made to.
_TOKENWISE_KWARGS = frozenset({"scale", "ip_adapter_masks"})


class PrunedBlock:
    """The ``forward`` of a pruned ``Transformer2DModel`` instance.

    Attributes:
        ranking, recovery: the policies that the options name.
        kept: the last choice of a graph of the whole UNet, where a choice serves several calls.
    """

    def __init__(self, name: str, module: nn.Module, level: int, whole_when_light: bool, calls: UNetCalls) -> None:
        self.name = name
        self.module = module
        self.level = level
        self.whole_when_light = whole_when_light
        self.calls = calls
        options = calls.options
        self.ranking = make_ranking(options.ranking, options.max_iterations, options.tolerance)
        self.recovery = RECOVERIES[options.recovery]
        # Looked up here, because torch.compile cannot look them up on diffusers' classes while it traces.
        self.forward = type(module).forward
        self.output = type(module)._get_output_for_continuous_inputs
        self.layer_forward = type(module.transformer_blocks[0]).forward
        # What another tool left on the instance; it goes back when pruning is removed.
        self.previous: Any = None
        self.kept: Kept | None = None

    def install(self) -> None:
        self.previous = self.module.__dict__.get("forward")
        self.module.forward = self

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "kept": None}

    def hold_kept(self) -> None:
        """Copy the last choice out of the memory of a CUDA graph, which the next graph to run writes over."""
        if self.kept is not None:
            self.kept = replace(self.kept, index=self.kept.index.clone(), scores=self.kept.scores.clone())

    def remembered(self, call: Call) -> Kept | None:
        """The choice that serves ``call``; None where it chooses."""
        if call.ranks:
            return None
        if torch.compiler.is_compiling():
            return self.kept
        kept = call.picture.kept.get(self.name)
        return kept if kept is not None and kept.choice == call.choice else None

    def remember(self, call: Call, kept: Kept) -> None:
        """Keep a choice for the calls that it serves as well."""
        if self.calls.options.rank_every == 1:
            return
        if torch.compiler.is_compiling():
            self.kept = kept
        elif call.picture is not None:
            call.picture.kept[self.name] = replace(kept, choice=call.choice)

    def check_unchanged(self) -> None:
        """Refuse what other tools have done to the module since :func:`atedm.apply`, which refuses it too.

        Raises:
            ValueError: the block can no longer be pruned.
        """
        first = self.module.transformer_blocks[0]
        reason = why_not_tokenwise(self.module) or why_hooked(first) or why_not_plain(first.attn1)
        if reason is not None:
            raise ValueError(f"{self.name} can no longer be pruned: {reason}; undo that, or call atedm.remove first")

    def count_kept(self, height: int, width: int) -> int:
        """How many tokens of a feature map are kept; a warning, once, where all are."""
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

    def __call__(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        height, width = hidden_states.shape[-2:]
        keep = self.count_kept(height, width)
        call = self.calls.current()
        if keep == height * width or (call.light and self.whole_when_light):
            return self.forward(self.module, hidden_states, *args, **kwargs)
        if torch.is_grad_enabled() and hidden_states.requires_grad:
            self.calls.say_once(
                "no gradients",
                "%s: gradients through a pruned block lack those through its attention; expected torch.no_grad() or "
                "torch.inference_mode(), or atedm.remove before training",
                self.name,
            )
        return self.forward(_CompactTransformer(self, call, keep, height, width), hidden_states, *args, **kwargs)


class _CompactTransformer:
    """Stand-in for a ``Transformer2DModel`` whose layers run on the kept tokens of one call."""

    def __init__(self, block: PrunedBlock, call: Call, keep: int, height: int, width: int) -> None:
        self._block = block
        self._call = call
        self._module = block.module
        self._keep = keep
        self._size = (height, width)
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

        by_cross_attention = block.ranking.attention == "cross"
        early = block.calls.options.placement == "early"
        if not by_cross_attention:
            self._choose(lambda: attention, attention)
            if early:
                # Cross-attention, feed-forward and output projection treat each token on its own: what they would
                # compute for a dropped token is never used.
                kept = kernels.gather_tokens(attended, self._refill.index)
                tokens = project_out(layer.attn1, kept) + kernels.gather_tokens(hidden_states, self._refill.index)
                return run_rest(tokens, self._for_kept(cross_attention_kwargs))
        hidden_states = project_out(layer.attn1, attended) + hidden_states
        if by_cross_attention:
            if encoder_attention_mask is not None:
                raise ValueError("encoder_attention_mask is set; expected None with ranking='cross'")
            self._choose(lambda: _cross_attention_map(layer, hidden_states, encoder_hidden_states), attention)
            if early:
                tokens = kernels.gather_tokens(hidden_states, self._refill.index)
                return run_rest(tokens, self._for_kept(cross_attention_kwargs))
        return kernels.gather_tokens(run_rest(hidden_states, cross_attention_kwargs), self._refill.index)

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
        """Self-attention of the first layer before its output projection ``[B, N, H·D]``, and its map."""
        q, k, v = project(layer.attn1, layer.norm1(hidden_states))
        scale = scale_of(layer.attn1)
        attended, lse = kernels.attention_with_logsumexp(q, k, v, scale=scale)
        parts = PERTURBING_PROCESSORS.get(type(layer.attn1.processor).__name__)
        if parts is not None:
            # The ranking is that of the map as it would be.
            perturbed = v.shape[0] // parts
            attended = torch.cat([attended[:-perturbed], v[-perturbed:]])
        return attended.transpose(1, 2).flatten(2), AttentionMap(q, k, lse, scale)

    def _choose(self, ranked_by: Callable[[], AttentionMap], attention: AttentionMap) -> None:
        """Choose the kept tokens, or keep an earlier choice, and find where the others come from.

        Args:
            ranked_by: makes the map that the ranking reads. attention: that of the self-attention.
        """
        block, iterations = self._block, None
        kept = block.remembered(self._call)
        # The batch may have changed on the way: a callback can end classifier-free guidance.
        if kept is None or kept.size != self._size or kept.index.shape != (attention.q.shape[0], self._keep):
            scores, iterations = block.ranking.scores(ranked_by())
            kept = Kept(self._select(scores), scores, self._size)
            block.remember(self._call, kept)
        self._refill = Refill(kept.index, *self._size, block.recovery.source(attention, kept.index))
        if self._call.recordings:
            self._record(kept, iterations)

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

    def _record(self, kept: Kept, iterations: Tensor | None) -> None:
        scores = join_heads(kept.scores.cpu(), self._block.calls.options.reduction).float()
        index, iterations = kept.index.cpu(), None if iterations is None else iterations.cpu()
        for recording, number in self._call.recordings:
            place = (number, self._call.step, self._block.name, self._block.level, *self._size)
            recording.ranked.append(Ranked(*place, scores, index, iterations))

    def _for_kept(self, kwargs: dict[str, Any] | None) -> dict[str, Any] | None:
        """Keyword arguments for attention on the kept tokens, from those for all."""
        if not kwargs or kwargs.get("ip_adapter_masks") is None:
            return kwargs
        if self._masks is None:
            tokens = self._size[0] * self._size[1]
            self._masks = masks_of_kept(kwargs["ip_adapter_masks"], self._refill.index, tokens)
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
