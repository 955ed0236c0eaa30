"""The number of graphs that ``torch.compile`` makes of a UNet or its parts, and torch's limit."""

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
from atedm.unet.other_tools import is_part

if TYPE_CHECKING:
    from atedm.unet.block import PrunedBlock
    from atedm.unet.calls import UNetCalls
    from atedm.unet.reuse import UNetStage

logger = logging.getLogger("atedm")

# The number of graphs of each function.
_Graphs = Counter[Callable[..., Any]]


@dataclass
class _Counted:
    """The graphs of one UNet: ``known`` for each of its settings, ``graphs`` for all settings so far, ``unpruned`` for
    modules that atedm does not change."""

    known: weakref.WeakKeyDictionary[UNetCalls, _Graphs] = field(default_factory=weakref.WeakKeyDictionary)
    graphs: _Graphs = field(default_factory=Counter)
    unpruned: _Graphs = field(default_factory=Counter)


# torch counts the graphs of all UNets of one class together, such as a base model and a refiner.
_counted: weakref.WeakKeyDictionary[nn.Module, _Counted] = weakref.WeakKeyDictionary()


def graphs_per_size(options: Options, runs_when_reused: bool = True) -> int:
    """Number of graphs of a UNet, or of a part, that ``options`` need for one image size: one for each kind of call.

    Args:
        runs_when_reused: whether the part runs in a step that reuses features.
    """
    if options.is_constant:
        return 1
    kinds = options.kinds if runs_when_reused else options.kinds - {"reused"}
    # A pruning call may make a choice or keep an earlier one, and may start from uniform scores or from earlier ones.
    choosing = len(options.kinds & PRUNING)
    return len(kinds) + choosing * (options.rank_every > 1) + choosing * options.starts_warm


def forward_is_compiled(module: nn.Module) -> bool:
    """Whether ``module.forward = torch.compile(module.forward)`` was done; if so, hooks run outside of the graph."""
    return hasattr(module.__dict__.get("forward"), "_torchdynamo_orig_callable")


def check_own_forward(module: nn.Module) -> None:
    """Refuse a copy whose compiled forward still runs the original.

    Args:
        module: a UNet, or a part of one.

    Raises:
        RuntimeError: the compiled forward of ``module`` belongs to the module that ``module`` was copied from.
    """
    if not forward_is_compiled(module):
        return
    forward = module.__dict__["forward"]._torchdynamo_orig_callable
    owner = getattr(forward, "module", getattr(forward, "__self__", module))  # atedm's forward has the attribute module
    if owner is not module:
        raise RuntimeError(
            f"the {type(module).__name__} is a copy, and its compiled forward runs what it was copied from; expected "
            "its own: compile it again, or del its attribute forward"
        )


def is_compiled(target: nn.Module, unet: nn.Module) -> bool:
    """Whether ``target`` runs ``unet`` as a graph: ``torch.compile``, ``unet.compile()`` or a compiled forward."""
    return target is not unet or unet._compiled_call_impl is not None or forward_is_compiled(unet)


def compiled_parts(places: Iterable[Place]) -> list[nn.Module]:
    """The modules on the way to ``places`` that were compiled one by one; the UNet itself is not among them."""
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
    """Count the graphs that ``calls`` need of the compiled ``modules``, and warn if torch will not keep so many.

    torch counts graphs per function, and all attention blocks run the same function.
    """
    counted = _counted.setdefault(unet, _Counted())
    options, own, counted.unpruned = calls.options, _Graphs(), _Graphs()
    # Graphs of calls that remember nothing because another picture has the slot: one if such calls are all whole, else
    # one for each kind.
    without_memory = 0 if not options.follows_pictures else 1 if options.remembers else len(options.kinds)
    for module in modules:
        part = _part_on(module)
        if part is None:
            own[type(module).forward] += graphs_per_size(options) + without_memory
            counted.unpruned[type(module).forward] += 1
        else:
            own[type(part).__call__] += graphs_per_size(options, part.runs_when_reused) + without_memory
    earlier = counted.known.get(calls, _Graphs())
    own |= earlier  # both the whole UNet and its parts may be compiled
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
    """The forward that atedm has put on ``module``; None if it has put none."""
    forward = module.__dict__.get("forward")
    return forward if is_part(forward) else None
