"""The fused attention that torch itself would run, with the logsumexp that it computes anyway.

``torch.nn.functional.scaled_dot_product_attention`` discards the logsumexp, although the kernels below it return it.
Calling the kernel directly costs the same as attention alone. torch chooses it (``torch._fused_sdp_choice``), so
``torch.nn.attention.sdpa_kernel`` still works.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend

from atedm_kernels._checks import score_dtype
from atedm_kernels.ops.attention_with_logsumexp.reference import attention_with_logsumexp_reference

aten = torch.ops.aten

_FLASH = int(SDPBackend.FLASH_ATTENTION.value)
_EFFICIENT = int(SDPBackend.EFFICIENT_ATTENTION.value)
_CUDNN = int(SDPBackend.CUDNN_ATTENTION.value)

# Head dims are padded with zeros to a multiple of this: zeros change no product, and fused kernels load 16 bytes.
_HEAD_DIM_MULTIPLE = 8


def attention_with_logsumexp_torch(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Attention and its logsumexp by torch's fused kernel, or by the reference if no fused kernel serves the inputs."""
    fused = _fused_attention(q, k, v, scale)
    if fused is None:
        return attention_with_logsumexp_reference(q, k, v, scale)
    out, lse = fused
    return out.transpose(1, 2).contiguous().transpose(1, 2), lse.to(score_dtype(q)).contiguous()


def _fused_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor] | None:
    """``out [B, H, M, D]`` and ``lse [B, H, M]`` in the kernel's layouts, or None if no fused kernel serves."""
    head_dim = q.shape[-1]
    padding = -head_dim % _HEAD_DIM_MULTIPLE
    if padding:
        q, k, v = (F.pad(x, (0, padding)) for x in (q, k, v))
    choice = torch._fused_sdp_choice(q, k, v, scale=scale)
    if q.device.type == "cpu":
        if choice != _FLASH:
            return None
        out, lse = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, scale=scale)
    elif choice == _FLASH:
        out, lse = aten._scaled_dot_product_flash_attention(q, k, v, scale=scale)[:2]
    elif choice == _CUDNN:
        out, lse = aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, scale=scale)[:2]
    elif choice == _EFFICIENT:
        out, lse = aten._scaled_dot_product_efficient_attention(q, k, v, None, True, scale=scale)[:2]
    else:
        return None
    # cuDNN gives [B, H, M, 1], the efficient kernel [B, H, M padded to 32].
    lse = lse.reshape(q.shape[0], q.shape[1], -1)[:, :, : q.shape[2]]
    return out[..., :head_dim], lse
