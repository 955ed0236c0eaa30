"""Gradients through a UNet that remembers: which calls record them, and what is refused because it would cut them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves


def records_gradients(unet: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a call records what the gradient of an input or of a parameter needs."""
    if not torch.is_grad_enabled():
        return False
    return require_gradients(args, kwargs) or any(weight.requires_grad for weight in unet.parameters())


def require_gradients(*inputs: Any) -> bool:
    """Whether a tensor among ``inputs``, which may be nested, requires a gradient."""
    return any(isinstance(x, Tensor) and x.requires_grad for x in tree_leaves(inputs))


def is_in_backward() -> bool:
    """Whether a backward runs in this thread: then a checkpoint computes something again."""
    return torch._C._current_graph_task_id() != -1


def refuse_reentrant(differ: str) -> None:
    """Refuse to compute a call of the UNet again. ``differ``: the options that make calls differ.

    Raises:
        RuntimeError: always.
    """
    raise RuntimeError(
        "a reentrant checkpoint computes the UNet again to differentiate it, but the first time it ran without "
        f"gradients, by what atedm remembers ({differ}); expected use_reentrant=False, or settings that remember "
        "nothing, such as 'paper'"
    )


def refuse_gradients(*inputs: Any) -> None:
    """Refuse to continue from what earlier calls computed: no gradient goes through that. ``inputs`` may be nested.

    Calls whose inputs or parameters require gradients remember nothing and do not get here.

    Raises:
        RuntimeError: a tensor among ``inputs`` requires a gradient that is being recorded.
    """
    if torch.is_grad_enabled() and require_gradients(*inputs):
        raise RuntimeError(
            "the call records gradients of something that is neither an input nor a parameter of the UNet, such as "
            "weights that a hook or another tool's forward brings in, and none would go through what atedm remembers; "
            "expected torch.no_grad(), or settings that remember nothing, such as 'paper'"
        )
