"""What a ranking and a recovery read: an attention map that is never stored."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


class AttentionMap:
    """``A_ij = exp(scale · q_i·k_j − lse_i)``. It is only read to make choices.

    Its tensors may require gradients. Read them by ops that record none, as all ops for attention maps do, or detach
    them first.

    Attributes:
        q: ``[B, H, M, D]``. k: ``[B, H, N, D]``. lse: float32 ``[B, H, M]``. scale: None for ``1/sqrt(D)``.
    """

    def __init__(self, q: Tensor, k: Tensor, lse: Tensor, scale: float | None) -> None:
        self.q, self.k, self.lse, self.scale = q, k, lse, scale
        self._of_unit_keys: AttentionMap | None = None

    def of_unit_keys(self) -> AttentionMap:
        """The map of the keys with themselves, scaled to length 1 and without the softmax: ``exp(cos(k_i, k_j))``.

        The keys show best how similar two tokens are (ToMe, section 3). A logsumexp of 0 leaves the exponential
        unchanged, so the kernels for attention maps can read this map too.
        """
        if self._of_unit_keys is None:
            unit = unit_keys(self.k.detach())
            dtype = torch.promote_types(unit.dtype, torch.float32)
            lse = torch.zeros(unit.shape[:3], dtype=dtype, device=unit.device)
            self._of_unit_keys = AttentionMap(unit, unit, lse, 1.0)
        return self._of_unit_keys


def unit_keys(k: Tensor) -> Tensor:
    """Keys ``[B, H, N, D]`` scaled to length 1; keys shorter than 1e-4 stay shorter than 1."""
    return F.normalize(k, dim=-1, eps=1e-4)  # in fp16 the usual 1e-12 is 0
