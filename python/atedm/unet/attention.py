"""The linear parts of a plain attention, one by one, and IP-Adapter masks for the kept tokens."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.image_processor import IPAdapterMaskProcessor
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from atedm_kernels import gather_tokens
from atedm_kernels.ops.gather_pair import gather_pair


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


def project(attention: nn.Module, hidden_states: Tensor, index: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values ``[B, H, N, D]`` of a self-attention; with ``index`` ``[B, K]``, queries only of these
    tokens."""
    if _is_fused(attention):
        q, k, v = attention.to_qkv(hidden_states).chunk(3, dim=-1)
        q = q if index is None else gather_tokens(q, index)
    else:
        asking = hidden_states if index is None else gather_tokens(hidden_states, index)
        q, k, v = attention.to_q(asking), attention.to_k(hidden_states), attention.to_v(hidden_states)
    q, k, v = (_split_heads(x, attention.heads) for x in (q, k, v))
    return *_normed(attention, q, k), v


def project_cross(attention: nn.Module, hidden_states: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
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

    def project(attended: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        attended, tokens = gather_pair(attended, tokens, index)
        return project_out(attention, attended), tokens

    # A compiler chooses itself what the backward computes again.
    is_saved = torch.is_grad_enabled() and attended.requires_grad and not torch.compiler.is_compiling()
    if is_saved and any(weight.requires_grad for weight in attention.to_out.parameters()):
        return checkpoint(project, attended, tokens, use_reentrant=False)
    return project(attended, tokens)


def scale_of(attention: nn.Module) -> float | None:
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
