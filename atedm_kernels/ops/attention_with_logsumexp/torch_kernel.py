"""The fused attention that torch itself would run, with the logsumexp that it computes anyway.

``torch.nn.functional.scaled_dot_product_attention`` discards the logsumexp, although the kernels that it calls return
it. Calling a kernel directly costs the same as attention without the logsumexp. torch still chooses the kernel
(``torch._fused_sdp_choice``), so ``torch.nn.attention.sdpa_kernel`` works.
"""

from __future__ import annotations

import torch
from torch import Tensor

from atedm_kernels._checks import score_dtype
from atedm_kernels.ops.attention_with_logsumexp.reference import attention_with_logsumexp_reference
from atedm_kernels.ops.torch_attention import CUDNN, EFFICIENT, FLASH, pad_head_dims, tokens_first

aten = torch.ops.aten


def attention_with_logsumexp_torch(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Attention and its logsumexp by torch's fused kernel, or by the reference if no fused kernel serves the inputs."""
    fused = _fused_attention(q, k, v, scale)
    if fused is None:
        return attention_with_logsumexp_reference(q, k, v, scale)
    out, lse = fused
    return tokens_first(out), lse.to(score_dtype(q)).contiguous()


def _fused_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor] | None:
    """``out [B, H, M, D]`` and ``lse [B, H, M]`` in the kernel's layouts; None if no fused kernel serves them."""
    head_dim = q.shape[-1]
    q, k, v = pad_head_dims(q, k, v)
    choice = torch._fused_sdp_choice(q, k, v, scale=scale)
    if q.device.type == "cpu":
        if choice != FLASH:
            return None
        out, lse = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, scale=scale)
    elif choice == FLASH:
        out, lse = aten._scaled_dot_product_flash_attention(q, k, v, scale=scale)[:2]
    elif choice == CUDNN:
        out, lse = aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, scale=scale)[:2]
    elif choice == EFFICIENT:
        out, lse = aten._scaled_dot_product_efficient_attention(q, k, v, None, True, scale=scale)[:2]
    else:
        return None
    # cuDNN gives [B, H, M, 1], the efficient kernel [B, H, M padded to 32].
    lse = lse.reshape(q.shape[0], q.shape[1], -1)[:, :, : q.shape[2]]
    return out[..., :head_dim], lse
