"""What a pruned block computes of a plain attention: its parts one by one, its map, masks for the kept tokens."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.image_processor import IPAdapterMaskProcessor
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import atedm_kernels as kernels
from atedm.policy.attention_map import AttentionMap
from atedm_kernels.ops.gather_pair import gather_pair

# The processors of perturbed-attention guidance, with the number of equal parts that they split the batch into. They
# perturb the last part: each of its tokens attends only to itself.
PERTURBING_PROCESSORS = {"PAGIdentitySelfAttnProcessor2_0": 2, "PAGCFGIdentitySelfAttnProcessor2_0": 3}


def self_attention(layer: nn.Module, hidden_states: Tensor, index: Tensor | None) -> tuple[Tensor, AttentionMap]:
    """The self-attention of a layer before its output projection, ``[B, M, H·D]``, and its map.

    With ``index`` ``[B, K]``, queries are computed only for these tokens.
    """
    attention = layer.attn1
    q, k, v = _project(attention, layer.norm1(hidden_states), index)
    scale = _scale_of(attention)
    attended, lse = kernels.attention_with_logsumexp(q, k, v, scale=scale)
    parts = PERTURBING_PROCESSORS.get(type(attention.processor).__name__)
    if parts is not None:
        # The perturbed part keeps its own values. The ranking reads the map as it is without perturbation.
        own = v[-(v.shape[0] // parts) :]
        if index is not None:
            at = index[-own.shape[0] :, None, :, None].expand(-1, own.shape[1], -1, own.shape[3])
            own = own.gather(2, at)
        attended = torch.cat([attended[: -own.shape[0]], own])
    return attended.transpose(1, 2).flatten(2), AttentionMap(q, k, lse, scale)


@torch.no_grad()
def cross_attention_map(layer: nn.Module, hidden_states: Tensor, text: Any) -> AttentionMap:
    """The map of a layer's cross-attention. ``text`` may be an IP-Adapter's pair of text and images."""
    attention = layer.attn2
    if isinstance(text, tuple):
        text = text[0]
    q, k = _project_cross(attention, layer.norm2(hidden_states), text)
    scale = _scale_of(attention)
    # Only the logsumexp is needed, so the keys stand in for the values.
    _, lse = kernels.attention_with_logsumexp(q, k, k, scale=scale)
    return AttentionMap(q, k, lse, scale)


def _split_heads(x: Tensor, heads: int) -> Tensor:
    """``[B, N, H·D]`` → a view ``[B, H, N, D]``."""
    return x.unflatten(2, (heads, -1)).transpose(1, 2)


def _normed(attention: nn.Module, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    if attention.norm_q is not None:
        q = attention.norm_q(q)
    if attention.norm_k is not None:
        k = attention.norm_k(k)
    return q, k


def _is_fused(attention: nn.Module) -> bool:
    """Whether the processor reads the fused projections. diffusers leaves them on the module when it unfuses."""
    return type(attention.processor).__name__ == "FusedAttnProcessor2_0"


def _project(attention: nn.Module, hidden_states: Tensor, index: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values ``[B, H, N, D]`` of a self-attention; with ``index`` ``[B, K]``, queries only of these
    tokens."""
    if _is_fused(attention):
        q, k, v = attention.to_qkv(hidden_states).chunk(3, dim=-1)
        q = q if index is None else kernels.gather_tokens(q, index)
    else:
        asking = hidden_states if index is None else kernels.gather_tokens(hidden_states, index)
        q, k, v = attention.to_q(asking), attention.to_k(hidden_states), attention.to_v(hidden_states)
    q, k, v = (_split_heads(x, attention.heads) for x in (q, k, v))
    return *_normed(attention, q, k), v


def _project_cross(attention: nn.Module, hidden_states: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
    """Queries ``[B, H, M, D]`` and keys ``[B, H, N, D]`` of a cross-attention."""
    if attention.norm_cross:
        text = attention.norm_encoder_hidden_states(text)
    k = attention.to_kv(text).chunk(2, dim=-1)[0] if _is_fused(attention) else attention.to_k(text)
    q, k = (_split_heads(x, attention.heads) for x in (attention.to_q(hidden_states), k))
    return _normed(attention, q, k)


def project_out(attention: nn.Module, attended: Tensor) -> Tensor:
    """``[B, N, H·D]`` → ``[B, N, C]``, for any N."""
    for module in attention.to_out:
        attended = module(attended)
    return attended


def project_out_kept(attention: nn.Module, attended: Tensor, tokens: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """Keep the tokens ``index`` ``[B, K]`` of ``attended`` ``[B, N, H·D]``, projected, and of ``tokens`` ``[B, N, C]``.

    A trained projection saves its input for its gradient. These rows would be saved a second time where the attention
    saves ``attended``; there the backward gathers them again.
    """

    def project(attended: Tensor) -> Tensor:
        return project_out(attention, kernels.gather_tokens(attended, index))

    # A compiler chooses itself what the backward computes again.
    is_saved = torch.is_grad_enabled() and attended.requires_grad and not torch.compiler.is_compiling()
    if is_saved and any(weight.requires_grad for weight in attention.to_out.parameters()):
        # Outside of the checkpoint, which would keep all of ``tokens`` until the backward.
        return checkpoint(project, attended, use_reentrant=False), kernels.gather_tokens(tokens, index)
    attended, tokens = gather_pair(attended, tokens, index)
    return project_out(attention, attended), tokens


def _scale_of(attention: nn.Module) -> float | None:
    """The scale of the logits; None for ``1/sqrt(D)``, the usual one."""
    head_dim = attention.inner_dim // attention.heads
    is_read = not type(attention.processor).__name__.endswith("2_0")  # those ignore attention.scale: torch's default
    return attention.scale if is_read and attention.scale != head_dim**-0.5 else None


def masks_of_kept(masks: Any, index: Tensor, tokens: int) -> list[Any]:
    """Masks of IP-Adapters, which say where an image prompt counts, reduced to the kept tokens.

    diffusers' processors read them at the kept tokens as they would read ``masks`` at all tokens.

    A processor resizes each mask to as many pixels as there are queries, in the mask's own aspect ratio. A mask that is
    one pixel high and one pixel per kept token wide therefore stays unchanged.

    Args:
        masks: for each adapter ``[1, images, height, width]``, of any size, or None; or all in one tensor ``[adapters,
            1, height, width]``, diffusers' older form.
        index: int64 ``[B, K]``, the kept tokens.
        tokens: number of tokens of the whole feature map.

    Returns:
        For each adapter ``[B, images, 1, K]``, or None if it has no mask. Any other entry is passed on: the processor
        raises.
    """
    if isinstance(masks, Tensor):
        masks = list(masks.unsqueeze(1))
    return [_mask_of_kept(m, index, tokens) if isinstance(m, Tensor) and m.ndim == 4 else m for m in masks]


def _mask_of_kept(mask: Tensor, index: Tensor, tokens: int) -> Tensor:
    at_tokens = [
        IPAdapterMaskProcessor.downsample(image, index.shape[0], tokens, 1)[..., 0] for image in mask.unbind(1)
    ]
    at_tokens = torch.stack(at_tokens, dim=1).to(index.device)
    return at_tokens.gather(2, index[:, None].expand(-1, mask.shape[1], -1))[:, :, None]
