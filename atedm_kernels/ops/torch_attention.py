"""torch's own fused attention kernels: the codes by which torch names them, and the layouts of their tensors."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend

FLASH = int(SDPBackend.FLASH_ATTENTION.value)
EFFICIENT = int(SDPBackend.EFFICIENT_ATTENTION.value)
CUDNN = int(SDPBackend.CUDNN_ATTENTION.value)

# Head dims are padded with zeros to a multiple of this: zeros change no product, and fused kernels load 16 bytes.
_HEAD_DIM_MULTIPLE = 8


def pad_head_dims(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Pad each ``[B, H, N, D]`` with zeros to a head dim that fused kernels take."""
    padding = -tensors[0].shape[-1] % _HEAD_DIM_MULTIPLE
    return tuple(F.pad(x, (0, padding)) for x in tensors) if padding else tensors


def tokens_first(x: Tensor) -> Tensor:
    """``x`` ``[B, H, N, D]``, stored as ``[B, N, H, D]``."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)
