"""Decide which attention blocks of a UNet are pruned, and say why one cannot be."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable

from diffusers.models.attention import BasicTransformerBlock, FeedForward
from diffusers.models.attention_processor import Attention
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import nn

from atedm.policy.options import Options
from atedm.policy.placement import PLACEMENTS
from atedm.unet.attention import PERTURBING_PROCESSORS
from atedm.unet.blocks import AttentionBlock, attention_blocks
from atedm.unet.other_tools import is_diffusers_own, parts_of, processor_of, runs_its_own_forward, why_replaced
from atedm_kernels import MAX_HEAD_DIM, MIN_HEAD_DIM

logger = logging.getLogger("atedm")

# Self-attention processors that compute plain scaled dot-product attention over one set of projections. In the first
# layer of a pruned block atedm's own attention, which also returns the logsumexp, replaces them.
_PLAIN_PROCESSORS = frozenset(
    {
        "AttnProcessor",
        "AttnProcessor2_0",
        "FusedAttnProcessor2_0",
        "SlicedAttnProcessor",
        "XFormersAttnProcessor",
    }
)

# Cross-attention processors that treat each query separately, whatever its position.
_TOKENWISE_PROCESSORS = _PLAIN_PROCESSORS | {
    "AttnProcessorNPU",
    "CustomDiffusionAttnProcessor",
    "CustomDiffusionAttnProcessor2_0",
    "CustomDiffusionXFormersAttnProcessor",
    "IPAdapterAttnProcessor",
    "IPAdapterAttnProcessor2_0",
    "IPAdapterXFormersAttnProcessor",
}

# The method that the forward of an attention block calls last.
METHOD = "_get_output_for_continuous_inputs"

# The norms of an attention that span all of its tokens.
NORMS = ("group_norm", "spatial_norm")

# The methods of an attention that processors call.
METHODS = (
    "get_attention_scores",
    "prepare_attention_mask",
    "head_to_batch_dim",
    "batch_to_head_dim",
    "norm_encoder_hidden_states",
)

# The attributes that decide whether an attention is plain, besides its processor.
PLAIN = (*NORMS, "residual_connection", "rescale_output_factor", "is_cross_attention")

# The attributes of a layer that decide whether tokens can be ranked from it, besides its positional embeddings and its
# attention.
LAYER = ("norm_type", "only_cross_attention", "double_self_attention")

# Stands in for the code of a forward that is not a Python function.
_NO_CODE = (lambda: None).__code__

# UNets for which a block without layers has been logged.
_said_empty: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def blocks_to_prune(
    unet: UNet2DConditionModel, options: Options, is_pruned: Callable[[nn.Module], bool]
) -> list[AttentionBlock]:
    """The blocks that ``options`` prune, in the order in which they run.

    Args:
        is_pruned: whether a module's forward is atedm's.

    Raises:
        ValueError: there is no block to prune, or one cannot be pruned; the message says which and why.
    """
    if not options.prunes:
        return []
    blocks = attention_blocks(unet)
    available = sorted({block.level for block in blocks})
    if not blocks:
        if options.ratio == 0:
            return []
        raise ValueError("the UNet has no attention block; expected at least one to prune")
    for name, levels in (
        ("levels", options.levels),
        ("ratio", options.ratio if isinstance(options.ratio, dict) else ()),
    ):
        unknown = sorted(set(levels or ()) - set(available), key=str)
        if unknown:
            raise ValueError(f"{name} names level {unknown[0]!r}; expected levels with attention: {available}")
    chosen = [block for block in blocks if options.levels is None or block.level in options.levels]
    if isinstance(options.ratio, dict):
        chosen = [block for block in chosen if options.ratio_at(block.level) > 0]
    empty = [block.name for block in chosen if not len(getattr(block.module, "transformer_blocks", [None]))]
    if empty and unet not in _said_empty:
        _said_empty.add(unet)
        logger.warning("%s: without layers there is nothing to prune, so it stays whole", ", ".join(empty))
    chosen = [block for block in chosen if block.name not in empty]
    for block in chosen:
        reason = _why_not_prunable(block.module, options.ratio_at(block.level), is_pruned(block.module))
        if reason is not None:
            raise ValueError(f"{block.name} cannot be pruned: {reason}")
    min_layers = PLACEMENTS[options.placement].min_layers
    chosen = [block for block in chosen if len(block.module.transformer_blocks) >= min_layers]
    if options.steps.constant == "light":
        chosen = [block for block in chosen if not block.whole_when_light]
    if not chosen:
        raise ValueError(
            f"no attention block is left to prune with ratio={options.ratio}, levels={options.levels}, "
            f"schedule={options.schedule} and placement={options.placement!r}; "
            f"expected some of the levels {available} with {'attention' if min_layers == 1 else 'more than one layer'}"
        )
    return chosen


def _why_not_prunable(module: nn.Module, ratio: float, is_pruned: bool) -> str | None:
    """Why ``ratio`` of an attention block's tokens cannot be dropped; None if they can.

    With a ratio of 0 the block's own forward runs, so what its layers compute does not matter. ``is_pruned``: whether
    its forward is atedm's.
    """
    if not isinstance(module, Transformer2DModel):
        return f"it is a {type(module).__name__}; expected a Transformer2DModel"
    if not is_pruned and not runs_its_own_forward(module):
        return "its forward has been replaced by another tool; apply atedm first, or undo the other"
    if ratio == 0:
        return None
    if not module.is_input_continuous:
        return "its input is not a feature map"
    if "__class__" in getattr(type(module).forward, "__code__", _NO_CODE).co_freevars:
        return f"the forward of its class {type(module).__name__} calls super(), which a stand-in for it lacks"
    if not is_diffusers_own(getattr(type(module), METHOD)):
        return f"the method {METHOD} of its class {type(module).__name__} is not diffusers' own"
    for i, layer in enumerate(module.transformer_blocks):
        if hasattr(layer, "fuser"):
            return f"its layer {i} has GLIGEN's fuser, which attends to positions of the full image"
    return why_not_tokenwise(module) or why_not_rankable(module.transformer_blocks[0])


def why_not_tokenwise(module: nn.Module) -> str | None:
    """Why the layers of an attention block cannot run on a subset of the tokens; None if they can."""
    for i, layer in enumerate(module.transformer_blocks):
        # tomesd replaces the class by its own, which assumes that the tokens form a whole grid.
        if getattr(type(layer), "forward", None) is not BasicTransformerBlock.forward:
            return f"its layer {i} is a {type(layer).__name__}; expected the forward of a BasicTransformerBlock"
        if getattr(layer, "pos_embed", None) is not None:
            return f"its layer {i} has positional embeddings; expected none, as they count on all tokens"
        for name, part in parts_of(layer):
            if name in (".attn1", ".attn2"):
                reason = _why_not_for_some_tokens(part, is_ranked=i == 0 and name == ".attn1")
                if reason is not None:
                    return f"its layer {i}{name} {reason}"
            elif name == ".ff" and getattr(type(part), "forward", None) is not FeedForward.forward:
                return f"its layer {i}.ff is a {type(part).__name__}; expected the forward of a FeedForward"
            reason = why_replaced(i, name, part)
            if reason is not None:
                return reason
    if METHOD in vars(module):
        return f"its method {METHOD} has been replaced by another tool"
    for kind in (BasicTransformerBlock, Attention, FeedForward):
        if not is_diffusers_own(kind.forward):
            return f"the forward of the class {kind.__name__} has been replaced by another tool"
    replaced = [name for name in METHODS if not is_diffusers_own(getattr(Attention, name))]
    return f"the method {replaced[0]} of the class Attention has been replaced by another tool" if replaced else None


def _why_not_for_some_tokens(attention: nn.Module, is_ranked: bool) -> str | None:
    """Why an attention cannot run on a subset of the queries; None if it can.

    ``is_ranked``: atedm's own attention replaces its processor, which :func:`_why_not_plain` checks.
    """
    if getattr(type(attention), "forward", None) is not Attention.forward:
        return f"is a {type(attention).__name__}; expected the forward of an Attention"
    replaced = [name for name in METHODS if name in vars(attention)]
    if replaced:
        return f"has another tool's method {replaced[0]}"
    if is_ranked:
        return None
    processor = processor_of(attention)
    if processor not in _TOKENWISE_PROCESSORS and processor not in PERTURBING_PROCESSORS:
        return f"runs through {processor}, which may count on all tokens"
    if _has_norm(attention):
        return "has a norm over all tokens"
    return None


def _why_hooked(layer: nn.Module) -> str | None:
    """Why forward hooks on a block's first layer forbid pruning it; None if there are no hooks."""
    for part, module in (("first layer", layer), ("first self-attention", layer.attn1)):
        if module._forward_hooks or module._forward_pre_hooks:
            return f"its {part} has forward hooks, which would not be called; expected none"
    return None


def why_not_rankable(layer: nn.Module) -> str | None:
    """Why tokens cannot be ranked from the first layer of a block; None if they can."""
    hooked = _why_hooked(layer)
    if hooked is not None:
        return hooked
    if layer.norm_type != "layer_norm" or layer.pos_embed is not None:
        return (
            f"its first layer has norm_type {layer.norm_type!r} or positional embeddings; expected a plain layer_norm"
        )
    if layer.only_cross_attention or layer.double_self_attention:
        return "its first layer has no pair of one self-attention and one cross-attention"
    head_dim = layer.attn1.inner_dim // layer.attn1.heads
    if not MIN_HEAD_DIM <= head_dim <= MAX_HEAD_DIM:
        return f"its heads have {head_dim} dimensions; expected {MIN_HEAD_DIM} to {MAX_HEAD_DIM}"
    return _why_not_plain(layer.attn1)


def _has_norm(attention: nn.Module) -> bool:
    return any(getattr(attention, name) is not None for name in NORMS)


def _why_not_plain(attention: nn.Module) -> str | None:
    """Why ``attention`` is not plain softmax attention with an output projection; None if it is."""
    processor = processor_of(attention)
    if processor not in _PLAIN_PROCESSORS and processor not in PERTURBING_PROCESSORS:
        return f"its self-attention runs through {processor}; expected one of {', '.join(sorted(_PLAIN_PROCESSORS))}"
    if _has_norm(attention) or attention.residual_connection:
        return "its self-attention has a norm or residual of its own"
    if attention.rescale_output_factor != 1 or attention.is_cross_attention:
        return "its self-attention rescales its output or attends to other states"
    return None
