"""Gradients of attention by the backward of the fused kernel that torch itself would run.

All kernels return the same logsumexp, so the backward of one serves the forward of another. That happens when torch
chooses another kernel for the backward: ``torch.nn.attention.sdpa_kernel`` may have been left in between, and a
kernel's backward may need more of a GPU than its forward.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from atedm_kernels.ops.attention_backward.reference import Gradients, attention_backward_reference
from atedm_kernels.ops.torch_attention import CUDNN, EFFICIENT, FLASH, pad_head_dims, tokens_first

aten = torch.ops.aten

# The efficient kernel reads the logsumexp in blocks of this many rows.
_EFFICIENT_ROWS = 32


def attention_backward_torch(
    gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float
) -> Gradients:
    """Gradients by torch's fused kernel, or by the reference if no fused kernel serves the inputs."""
    fused = _fused_backward(gradient, q, k, v, out, lse, scale)
    if fused is None:
        return attention_backward_reference(gradient, q, k, v, out, lse, scale)
    of_q, of_k, of_v = (tokens_first(x[..., : q.shape[-1]]) for x in fused)
    return of_q, of_k, of_v


def _fused_backward(
    gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float
) -> Gradients | None:
    """Gradients of the padded heads, in the kernel's layouts, or None if no fused kernel serves the inputs."""
    gradient, q, k, v, out = pad_head_dims(gradient, q, k, v, out)
    # The efficient kernel computes the strides of ``out`` from its shape, and padding changes the layout.
    gradient, out = tokens_first(gradient), tokens_first(out)
    with torch.enable_grad():  # some kernels serve fewer inputs if a backward follows
        choice = torch._fused_sdp_choice(*(x.detach().requires_grad_() for x in (q, k, v)), scale=scale)
    results = gradient, q, k, v, out
    if q.device.type == "cpu":
        if choice != FLASH:
            return None
        return aten._scaled_dot_product_flash_attention_for_cpu_backward(*results, lse, 0.0, False, scale=scale)
    queries, keys = q.shape[2], k.shape[2]
    seed = offset = torch.empty((), dtype=torch.int64, device=q.device)  # for dropout, which is not used
    if choice == FLASH:
        lengths = None, None, queries, keys, 0.0, False
        return aten._scaled_dot_product_flash_attention_backward(*results, lse, *lengths, seed, offset, scale=scale)
    if choice == CUDNN:
        lengths = None, None, None, queries, keys, 0.0, False
        return aten._scaled_dot_product_cudnn_attention_backward(
            *results, lse[..., None], seed, offset, *lengths, scale=scale
        )
    if choice == EFFICIENT:
        lse = F.pad(lse, (0, -queries % _EFFICIENT_ROWS), value=math.inf)
        wanted = [True, True, True, False]
        return aten._scaled_dot_product_efficient_attention_backward(
            gradient, q, k, v, None, out, lse, seed, offset, 0.0, wanted, scale=scale
        )[:3]
    return None
