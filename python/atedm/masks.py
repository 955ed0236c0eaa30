"""Masks of IP-Adapters, which say where in the picture an image prompt counts, for some of the tokens."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.image_processor import IPAdapterMaskProcessor
from torch import Tensor


def masks_of_kept(masks: Any, index: Tensor, tokens: int) -> list[Any]:
    """Masks that diffusers' processors read at the kept tokens as they would read ``masks`` at all of them.

    A processor resizes each mask to as many pixels as there are queries, in the mask's own aspect ratio. A mask one
    pixel high, and as wide as there are kept tokens, stays what it is.

    Args:
        masks: for each adapter ``[1, images, height, width]``, of any size, or None; or all in one ``[adapters, 1,
            height, width]``, diffusers' older form.
        index: int64 ``[B, K]``, the kept tokens.
        tokens: of the whole feature map.

    Returns:
        For each adapter ``[B, images, 1, K]``, or what it was if it is no such mask: the processor says so.
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
