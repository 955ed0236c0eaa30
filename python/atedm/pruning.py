"""What a pruned attention block computes.

Nothing of diffusers' forwards is copied. A block's own forward runs with a stand-in for ``self`` that answers for a
few attributes and passes every other one on: :class:`_CompactTransformer` for the ``Transformer2DModel`` (its first
layer prunes, its output recovers), :class:`_WithoutSelfAttention` for the first layer, once ours has computed its
self-attention. All state of a call lives in its stand-ins, so an exception leaves nothing behind.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import atedm_kernels as kernels
from atedm.blocks import PERTURBING_PROCESSORS, bypassed_hooks, why_not_plain
from atedm.keys import grid_first, rank_by_keys, sources_by_keys, unit_keys
from atedm.masks import masks_of_kept
from atedm.options import kept_tokens
from atedm.projections import project, project_cross, project_out, scale_of
from atedm.recording import Ranked
from atedm.recovery import append_zero_token, interpolate_bicubic, sources_or_zero
from atedm.state import PruningState
from atedm_kernels.ops.select_tokens import join_heads

# Keyword arguments for attention that are known to mean the same for a subset of the tokens, or are made to.
_TOKENWISE_KWARGS = frozenset({"scale", "ip_adapter_masks"})


@dataclass(frozen=True)
class Kept:
    """The tokens that a block keeps, ``index`` int64 ``[B, K]``, and their ``scores`` ``[B, H, N]``."""

    index: Tensor
    scores: Tensor


class PrunedForward:
    """The ``forward`` of a pruned ``Transformer2DModel`` instance."""

    def __init__(self, name: str, module: nn.Module, level: int, whole_when_light: bool, state: PruningState) -> None:
        self.name = name
        self.module = module
        self.level = level
        self.whole_when_light = whole_when_light
        self.state = state
        # Looked up here, because torch.compile cannot look them up on diffusers' classes while it traces.
        self.forward = type(module).forward
        self.output = type(module)._get_output_for_continuous_inputs
        self.layer_forward = type(module.transformer_blocks[0]).forward
        # What another tool left on the instance; it goes back when pruning is removed.
        self.previous: Any = None
        # What was last chosen, where a choice serves several calls.
        self.kept: Kept | None = None

    def install(self) -> None:
        self.previous = self.module.__dict__.get("forward")
        self.module.forward = self

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "kept": None}

    def hold_kept(self) -> None:
        """Copy what was chosen out of the memory of a CUDA graph, which is written over when one runs next."""
        if self.kept is not None:
            self.kept = Kept(self.kept.index.clone(), self.kept.scores.clone())

    def count_kept(self, height: int, width: int) -> int:
        """How many tokens of a feature map are kept; if all are, that is said."""
        options = self.state.options
        keep = kept_tokens(height * width, options.ratio_at(self.level), options.keep_multiple)
        if keep == height * width:
            self.state.say_once(
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
        if keep == height * width or (self.state.light and self.whole_when_light):
            return self.forward(self.module, hidden_states, *args, **kwargs)
        if torch.is_grad_enabled() and hidden_states.requires_grad:
            self.state.say_once(
                "no gradients",
                "%s: gradients through a pruned block lack those through its attention; expected torch.no_grad() or "
                "torch.inference_mode(), or atedm.remove before training",
                self.name,
            )
        return self.forward(_CompactTransformer(self, keep, height, width), hidden_states, *args, **kwargs)


class _CompactTransformer:
    """Stand-in for a ``Transformer2DModel`` whose layers run on the kept tokens of one call."""

    def __init__(self, patch: PrunedForward, keep: int, height: int, width: int) -> None:
        self._patch = patch
        self._module = patch.module
        self._keep = keep
        self._size = (height, width)
        self._index: Tensor | None = None
        self._source: Tensor | None = None
        self._unit: Tensor | None = None
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
        layer, options = self._module.transformer_blocks[0], self._patch.state.options
        self._check_call(layer, attention_mask, cross_attention_kwargs)
        q, k, v = project(layer.attn1, layer.norm1(hidden_states))
        scale = scale_of(layer.attn1)
        attended, lse = kernels.attention_with_logsumexp(q, k, v, scale=scale)
        parts = PERTURBING_PROCESSORS.get(type(layer.attn1.processor).__name__)
        if parts is not None:
            # The ranking is that of the map as it would be.
            perturbed = v.shape[0] // parts
            attended = torch.cat([attended[:-perturbed], v[-perturbed:]])
        attended = attended.transpose(1, 2).flatten(2)
        rest = _WithoutSelfAttention(layer)

        def run_rest(tokens: Tensor, cross_attention_kwargs: dict[str, Any] | None) -> Tensor:
            return self._patch.layer_forward(
                rest,
                tokens,
                encoder_hidden_states=encoder_hidden_states,
                encoder_attention_mask=encoder_attention_mask,
                timestep=timestep,
                cross_attention_kwargs=cross_attention_kwargs,
                class_labels=class_labels,
            )

        if options.ranking != "cross":
            self._choose(lambda rows: self._rank(q, k, lse, scale, rows), q.shape[0])
            self._find_sources(q, k, lse, scale)
            if options.placement == "early":
                # Cross-attention, feed-forward and output projection treat each token on its own, so what
                # they would compute for a dropped token is never used.
                kept = kernels.gather_tokens(attended, self._index)
                tokens = project_out(layer.attn1, kept) + kernels.gather_tokens(hidden_states, self._index)
                return run_rest(tokens, self._for_kept(cross_attention_kwargs))
        hidden_states = project_out(layer.attn1, attended) + hidden_states
        if options.ranking == "cross":
            if encoder_attention_mask is not None:
                raise ValueError("encoder_attention_mask is set; expected None with ranking='cross'")
            self._choose(lambda rows: self._rank_cross(layer, hidden_states, encoder_hidden_states, rows), q.shape[0])
            self._find_sources(q, k, lse, scale)
            if options.placement == "early":
                tokens = kernels.gather_tokens(hidden_states, self._index)
                return run_rest(tokens, self._for_kept(cross_attention_kwargs))
        return kernels.gather_tokens(run_rest(hidden_states, cross_attention_kwargs), self._index)

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

    def _for_kept(self, kwargs: dict[str, Any] | None) -> dict[str, Any] | None:
        """Keyword arguments for attention on the kept tokens, from those for all."""
        if not kwargs or kwargs.get("ip_adapter_masks") is None:
            return kwargs
        if self._masks is None:
            self._masks = masks_of_kept(kwargs["ip_adapter_masks"], self._index, self._size[0] * self._size[1])
        return {**kwargs, "ip_adapter_masks": self._masks}

    def _check_call(self, layer: nn.Module, attention_mask: Tensor | None, kwargs: dict[str, Any] | None) -> None:
        """What :func:`atedm.apply` cannot see: it depends on the call, or was changed since."""
        if attention_mask is not None:
            raise ValueError("attention_mask is set; expected None: the ranking would have to know masked tokens")
        unknown = sorted(set(kwargs or ()) - _TOKENWISE_KWARGS)
        if self._patch.state.halves and type(layer.attn1.processor).__name__ in PERTURBING_PROCESSORS:
            raise ValueError(
                "share_guidance is set; expected False with perturbed-attention guidance, whose batch is no two halves"
            )
        if unknown:
            raise ValueError(
                f"cross_attention_kwargs holds {', '.join(unknown)}; expected none but {', '.join(_TOKENWISE_KWARGS)} "
                "on a pruned UNet: others may name positions of the full image"
            )
        reason = why_not_plain(layer.attn1)
        if reason is not None:
            raise ValueError(f"{self._patch.name} can no longer be pruned: {reason}")
        hooked = bypassed_hooks(layer)
        if hooked is not None:
            self._patch.state.say_once(
                "hooks", "%s: forward hooks of its %s are not called while it is pruned", self._patch.name, hooked
            )

    def _rank(
        self, q: Tensor, k: Tensor, lse: Tensor, scale: float | None, rows: slice
    ) -> tuple[Tensor, Tensor | None]:
        """Scores of these ``rows`` of the batch, and the iterations they took."""
        options = self._patch.state.options
        if options.ranking == "keys":
            return rank_by_keys(self._unit_keys(k)[rows]), None
        q, k, lse = q[rows], k[rows], lse[rows]
        if callable(options.ranking):
            scores = options.ranking(q, k, lse)
            shape = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
            if not isinstance(scores, Tensor) or scores.ndim != 3 or (shape[0], shape[2]) != (q.shape[0], q.shape[2]):
                raise ValueError(f"ranking returned {shape}; expected scores [{q.shape[0]}, heads, {q.shape[2]}]")
            return scores, None
        return kernels.weighted_page_rank(
            q, k, lse, scale=scale, max_iterations=options.max_iterations, tolerance=options.tolerance
        )

    def _rank_cross(self, layer: nn.Module, hidden_states: Tensor, text: Any, rows: slice) -> tuple[Tensor, Tensor]:
        attention, options = layer.attn2, self._patch.state.options
        if isinstance(text, tuple):  # an IP-Adapter's (text, images)
            text = text[0]
        q, k = project_cross(attention, layer.norm2(hidden_states[rows]), text[rows])
        # Only the logsumexp is wanted, so the keys stand in for the values.
        _, lse = kernels.attention_with_logsumexp(q, k, k, scale=scale_of(attention))
        return kernels.weighted_page_rank_cross(
            q, k, lse, scale=scale_of(attention), max_iterations=options.max_iterations, tolerance=options.tolerance
        )

    def _choose(self, rank: Callable[[slice], tuple[Tensor, Tensor | None]], batch: int) -> None:
        """Set ``_index``, by ``rank`` of those rows of the batch that choose for all, or as it was before."""
        state, patch, iterations = self._patch.state, self._patch, None
        kept = None if state.ranks_anew else patch.kept
        # The batch may have changed on the way: a callback can end classifier-free guidance.
        if kept is None or kept.index.shape != (batch, self._keep):
            copies = 2 if state.halves else 1
            if batch % copies:
                raise ValueError(
                    f"share_guidance is set, but the batch has {batch} rows; expected an even number, "
                    "the two halves of classifier-free guidance"
                )
            scores, iterations = rank(slice(batch - batch // copies, batch))
            kept = Kept(self._select(scores).repeat(copies, 1), scores)
            if state.options.rank_every > 1:
                patch.kept = kept
        self._index = kept.index
        if state.recordings:
            self._record(kept, iterations)

    def _select(self, scores: Tensor) -> Tensor:
        options = self._patch.state.options
        if options.grid is not None:
            scores = grid_first(scores, *self._size, options.grid, self._keep)
        return kernels.select_tokens(scores, self._keep, reduction=options.reduction)

    def _record(self, kept: Kept, iterations: Tensor | None) -> None:
        state = self._patch.state
        # A half that has none of its own has the other's.
        copies = kept.index.shape[0] // kept.scores.shape[0]
        ranked = Ranked(
            state.call,
            state.step,
            self._patch.name,
            self._patch.level,
            *self._size,
            join_heads(kept.scores.cpu(), state.options.reduction).float().repeat(copies, 1),
            kept.index.cpu(),
            None if iterations is None else iterations.cpu().repeat(copies, 1),
        )
        for recording in state.recordings:
            recording.ranked.append(ranked)

    def _unit_keys(self, k: Tensor) -> Tensor:
        if self._unit is None:
            self._unit = unit_keys(k)
        return self._unit

    def _find_sources(self, q: Tensor, k: Tensor, lse: Tensor, scale: float | None) -> None:
        recovery = self._patch.state.options.recovery
        if recovery == "similarity":
            self._source = kernels.similarity_source(q, k, lse, self._index, scale=scale)
        elif recovery == "keys":
            self._source = sources_by_keys(self._unit_keys(k), self._index)
        elif recovery == "zeros":
            self._source = sources_or_zero(self._index, q.shape[2])

    def _get_output_for_continuous_inputs(self, hidden_states: Tensor, residual: Tensor, **sizes: Any) -> Tensor:
        """Output projection and recovery, which commute: the projection treats each token on its own."""
        options = self._patch.state.options
        if options.recovery == "zeros":
            hidden_states = append_zero_token(hidden_states)
        if options.placement == "paper":
            if options.recovery == "bicubic":
                hidden_states = interpolate_bicubic(hidden_states, self._index, *self._size)
            else:
                hidden_states = kernels.recover_tokens(hidden_states, self._source)
            return self._patch.output(self._module, hidden_states, residual, **sizes)
        projection = self._module.proj_out
        if self._module.use_linear_projection:
            compact = projection(hidden_states)
        else:
            # A 1×1 convolution over a map as high as there are tokens, and 1 wide.
            compact = projection(hidden_states.transpose(1, 2)[..., None])[..., 0].transpose(1, 2)
        if options.recovery == "bicubic":
            recovered = interpolate_bicubic(compact, self._index, *self._size)
            return residual + recovered.transpose(1, 2).unflatten(2, self._size)
        return kernels.recover_feature_map(compact, self._source, residual)


class _WithoutSelfAttention:
    """Stand-in for a ``BasicTransformerBlock`` whose self-attention has been added to its input already."""

    def __init__(self, layer: nn.Module) -> None:
        self._layer = layer

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_layer"], name)

    def norm1(self, hidden_states: Tensor) -> Tensor:
        return hidden_states

    def attn1(self, hidden_states: Tensor, **_: Any) -> Tensor:
        return hidden_states.new_zeros(())
