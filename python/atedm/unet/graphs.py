"""How many graphs ``torch.compile`` makes of a UNet or its parts for what is applied, and torch's limit of them."""

from __future__ import annotations

import logging
import weakref
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from atedm.policy.options import Options
from atedm.policy.schedule import PRUNING
from atedm.unet.blocks import Place

if TYPE_CHECKING:
    from atedm.unet.block import PrunedBlock
    from atedm.unet.calls import UNetCalls
    from atedm.unet.reuse import UNetStage

logger = logging.getLogger("atedm")

# How many graphs there are of each function.
_Graphs = Counter[Callable[..., Any]]


@dataclass
class _Counted:
    """Of one UNet: the graphs of each of its settings, of all settings so far, and those without any."""

    known: weakref.WeakKeyDictionary[UNetCalls, _Graphs] = field(default_factory=weakref.WeakKeyDictionary)
    graphs: _Graphs = field(default_factory=Counter)
    unpruned: _Graphs = field(default_factory=Counter)


# torch counts those of all UNets with one class, such as a base model and a refiner.
_counted: weakref.WeakKeyDictionary[nn.Module, _Counted] = weakref.WeakKeyDictionary()


def graphs_per_size(options: Options, runs_when_reused: bool = True) -> int:
    """How many graphs of a UNet, or of a part, ``options`` take for one image size: one for each kind of call.

    Args:
        runs_when_reused: whether it runs in a step that reuses features.
    """
    if options.is_constant:
        return 1
    kinds = options.kinds if runs_when_reused else options.kinds - {"reused"}
    # With a choice, and with an earlier one; from uniform scores, and from earlier ones.
    choosing = len(options.kinds & PRUNING)
    return len(kinds) + choosing * (options.rank_every > 1) + choosing * options.starts_warm


def forward_is_compiled(module: nn.Module) -> bool:
    """Whether ``module.forward = torch.compile(module.forward)`` was done: then hooks run outside of the graph."""
    return hasattr(module.__dict__.get("forward"), "_torchdynamo_orig_callable")


def check_own_forward(module: nn.Module) -> None:
    """
    Args:
        module: a UNet, or a part of one.

    Raises:
        RuntimeError: its compiled forward is that of a module which it is a copy of.
    """
    if not forward_is_compiled(module):
        return
    forward = module.__dict__["forward"]._torchdynamo_orig_callable
    owner = getattr(forward, "module", getattr(forward, "__self__", module))  # atedm's forward has a module
    if owner is not module:
        raise RuntimeError(
            f"the {type(module).__name__} is a copy, and its compiled forward runs what it was copied from; expected "
            "its own: compile it again, or del its attribute forward"
        )


def is_compiled(target: nn.Module, unet: nn.Module) -> bool:
    """Whether ``target`` runs ``unet`` as a graph: by ``torch.compile`` or ``unet.compile()``, or its forward."""
    return target is not unet or unet._compiled_call_impl is not None or forward_is_compiled(unet)


def compiled_parts(places: Iterable[Place]) -> list[nn.Module]:
    """The modules on the way to ``places``, the UNet aside, that were compiled one by one."""
    found: dict[int, nn.Module] = {}
    for place in places:
        is_wrapped = False
        for module in place.modules():
            is_wrapper = "_orig_mod" in module._modules
            if not is_wrapper and (is_wrapped or module._compiled_call_impl is not None or forward_is_compiled(module)):
                found[id(module)] = module
            is_wrapped = is_wrapper
    return list(found.values())


def count_graphs(unet: nn.Module, calls: UNetCalls, modules: list[nn.Module]) -> None:
    """Count those that ``calls`` takes of ``modules``, which are compiled; a warning where torch will not keep them.

    torch counts the graphs of a function, and all attention blocks run one.
    """
    counted = _counted.setdefault(unet, _Counted())
    options, own, counted.unpruned = calls.options, _Graphs(), _Graphs()
    # One more where nothing is remembered of a picture, since another has the room, or one for each kind.
    without_memory = 0 if not options.follows_pictures else 1 if options.remembers else len(options.kinds)
    for module in modules:
        part = _part_on(module)
        if part is None:
            own[type(module).forward] += graphs_per_size(options) + without_memory
            counted.unpruned[type(module).forward] += 1
        else:
            own[type(part).__call__] += graphs_per_size(options, part.runs_when_reused) + without_memory
    earlier = counted.known.get(calls, _Graphs())
    own |= earlier  # parts may be compiled beside the whole
    if own == earlier:
        return
    counted.known[calls] = own
    counted.graphs.update(own - earlier)
    limit = torch._dynamo.config.recompile_limit
    needed = max(sum(each.graphs[f] + each.unpruned[f] for each in _counted.values()) for f in own)
    if needed > limit:
        logger.warning(
            "the settings applied to compiled UNets so far need up to %d graphs of one function for each image size; "
            "torch makes %d and runs the rest uncompiled: set torch._dynamo.config.recompile_limit to at least %d for "
            "each size",
            needed,
            limit,
            needed,
        )


def _part_on(module: nn.Module) -> PrunedBlock | UNetStage | None:
    """The forward that atedm has put on ``module``."""
    forward = module.__dict__.get("forward")
    return forward if hasattr(forward, "runs_when_reused") else None
