"""Builds UNets with random weights that behave like trained ones where time depends on values."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import Tensor, nn

from atedm.app.models import latent_size, meta_unet
from atedm.unet.blocks import attention_blocks, feature_map_size
from atedm_bench.measure import attention_backend_of

# Standard deviation of a row of self-attention logits. With default weights it is near 0. The maps are then uniform,
# the ranking converges in its first iteration, and pruning looks cheaper than it is.
LOGIT_STD = 2.5

# Rows of each attention map that the calibration samples.
_SAMPLED_QUERIES = 64


def random_unet(
    config: Mapping[str, Any],
    *,
    dtype: torch.dtype,
    device: torch.device | str,
    channels_last: bool = True,
    seed: int = 0,
) -> UNet2DConditionModel:
    """Build a UNet with normal weights of variance ``1 / fan_in``, zero biases and norm weights of 1.

    The weights are allocated once, in ``dtype`` on ``device``: SDXL's 2.57 billion parameters take 5.1 GB in bf16.
    Their values depend on ``seed`` and on the type of device.
    """
    unet = meta_unet(config, dtype).to_empty(device=device)
    generator = torch.Generator(device).manual_seed(seed)
    for module in unet.modules():
        if isinstance(module, (nn.GroupNorm, nn.LayerNorm)):
            nn.init.ones_(module.weight)
        elif isinstance(module, (nn.Linear, nn.Conv2d)):
            module.weight.normal_(std=1 / math.sqrt(module.weight[0].numel()), generator=generator)
        elif next(module.parameters(recurse=False), None) is not None:
            raise ValueError(f"the UNet has a {type(module).__name__} with weights; expected linear, conv, norm layers")
        if getattr(module, "bias", None) is not None:
            nn.init.zeros_(module.bias)
    return unet.to(memory_format=torch.channels_last) if channels_last else unet


def sharing_weights(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """Return another UNet object with the same weights, to patch or compile separately. It takes no more memory."""
    copy = meta_unet(unet.config, unet.dtype)
    copy.load_state_dict(unet.state_dict(), assign=True)
    return copy.eval().requires_grad_(False)


def calibrate_attention(unet: UNet2DConditionModel, call: Callable[[], object], std: float = LOGIT_STD) -> list[float]:
    """Scale the query and key weights of every self-attention so that its logits have a given spread in ``call()``.

    Each layer is scaled just before it runs, so its input already comes from calibrated layers.

    Args:
        call: runs ``unet`` once. std: the target standard deviation of a row of logits, averaged over rows and heads.

    Returns:
        The standard deviation of each self-attention, measured again with the scaled weights.

    Raises:
        ValueError: the logits of a layer are all equal or not finite.
    """
    found: list[float] = []

    def scale(attention: nn.Module, args: tuple[Tensor, ...]) -> None:
        before = _logit_std(attention, args[0])
        if not (math.isfinite(before) and before > 0):
            raise ValueError(f"self-attention logits have a standard deviation of {before}; expected a positive number")
        for projection in (attention.to_q, attention.to_k):
            projection.weight.mul_(math.sqrt(std / before))
        found.append(_logit_std(attention, args[0]))

    layers = [module for name, module in unet.named_modules() if name.endswith(".attn1")]
    handles = [layer.register_forward_pre_hook(scale) for layer in layers]
    try:
        with torch.no_grad():
            call()
    finally:
        for handle in handles:
            handle.remove()
    return found


def _logit_std(attention: nn.Module, hidden_states: Tensor) -> float:
    """Return the standard deviation of a row of logits: the mean over heads and sampled rows of the first image."""
    tokens = hidden_states[0]
    stride = max(1, len(tokens) // _SAMPLED_QUERIES)
    q, k = attention.to_q(tokens[::stride]), attention.to_k(tokens)
    q, k = (x.float().unflatten(1, (attention.heads, -1)).transpose(0, 1) for x in (q, k))
    logits = q @ k.transpose(1, 2) / math.sqrt(q.shape[-1])
    return logits.std(dim=-1).mean().item()


def attention_kernels(unet: UNet2DConditionModel, width: int, height: int, batch: int) -> dict[str, str]:
    """Return the kernel that torch chooses for self-attention, by level, in a call on ``width`` × ``height`` pixels.

    The full UNet runs it through ``scaled_dot_product_attention``; the pruned one makes the same choice itself.
    """
    found = {}
    rows, columns = latent_size(width, height)
    for block in attention_blocks(unet):
        attention = block.module.transformer_blocks[0].attn1
        tokens = math.prod(feature_map_size(block.level, rows, columns))
        head_dim = attention.to_q.out_features // attention.heads
        q = torch.empty(batch, tokens, attention.heads, head_dim, dtype=unet.dtype, device=unet.device).transpose(1, 2)
        found[f"attention_level_{block.level}"] = attention_backend_of(q, q, q)
    return found
