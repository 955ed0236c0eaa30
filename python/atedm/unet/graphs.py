"""How many graphs ``torch.compile`` makes of a UNet or a part for what is applied to it, and torch's limit of them."""

from __future__ import annotations

import logging
import weakref
from typing import TYPE_CHECKING

import torch
from torch import nn

from atedm.policy.options import Options
from atedm.policy.schedule import PRUNING

if TYPE_CHECKING:
    from atedm.unet.calls import UNetCalls

logger = logging.getLogger("atedm")

# The settings whose graphs were counted for each UNet, and their sum.
_counted: weakref.WeakKeyDictionary[nn.Module, tuple[weakref.WeakSet[UNetCalls], int]] = weakref.WeakKeyDictionary()


def graphs_per_size(options: Options) -> int:
    """How many graphs of a UNet, or of a part, ``options`` take for one image size: one for each kind of call."""
    if options.is_constant:
        return 1
    # With a choice, and with an earlier one; from uniform scores, and from earlier ones.
    choosing = len(options.kinds & PRUNING)
    return len(options.kinds) + choosing * (options.rank_every > 1) + choosing * options.starts_warm


def forward_is_compiled(unet: nn.Module) -> bool:
    """Whether ``unet.forward = torch.compile(unet.forward)`` was done: then hooks run outside of the graph."""
    return hasattr(unet.__dict__.get("forward"), "_torchdynamo_orig_callable")


def is_compiled(target: nn.Module, unet: nn.Module) -> bool:
    """Whether ``target`` runs ``unet`` as a graph: by ``torch.compile`` or ``unet.compile()``, or its forward."""
    return target is not unet or unet._compiled_call_impl is not None or forward_is_compiled(unet)


def count_graphs(unet: nn.Module, calls: UNetCalls) -> None:
    """Count those of ``calls``, applied to a compiled ``unet``; a warning where torch will not keep them all."""
    known, graphs = _counted.get(unet, (weakref.WeakSet(), 1))  # one without pruning
    if calls in known:
        return
    known.add(calls)
    graphs += graphs_per_size(calls.options)
    _counted[unet] = known, graphs
    limit = torch._dynamo.config.recompile_limit
    if graphs > limit:
        logger.warning(
            "what was applied to this compiled UNet so far takes up to %d graphs for one image size, of it or of each "
            "compiled part; torch makes %d and runs the rest uncompiled: set torch._dynamo.config.recompile_limit to "
            "at least %d for each size",
            graphs,
            limit,
            graphs,
        )
