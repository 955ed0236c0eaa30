"""Put atedm's forwards and hooks on a UNet and take them off: the only place that changes somebody else's module."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

from torch import nn

from atedm.policy.options import Options
from atedm.unet.block import PrunedBlock
from atedm.unet.blocks import AttentionBlock, Place
from atedm.unet.calls import Following, UNetCalls
from atedm.unet.graphs import count_graphs, is_compiled
from atedm.unet.other_tools import runs_its_own_forward
from atedm.unet.reuse import UNetStage, make_stages, stages_of

# The settings last removed from each UNet. The guards of a compiled graph check for the very objects that it was made
# with, so applying equal settings reuses those objects and needs no new graph.
_EARLIER: weakref.WeakKeyDictionary[nn.Module, list[UNetCalls]] = weakref.WeakKeyDictionary()
_MAX_EARLIER = 8

# The attribute that holds a module's forward, and the one where accelerate keeps the forward that its hook wraps.
_FORWARDS = ("forward", "_old_forward")


def calls_of(unet: nn.Module) -> UNetCalls | None:
    """The hook that holds the state of what is applied to ``unet``; None if nothing is applied."""
    for hook in unet._forward_pre_hooks.values():
        if isinstance(hook, UNetCalls):
            return hook
    for module in unet.modules():  # another tool may have cleared the hooks
        for part in parts_on(module).values():
            if not part.calls.following.is_in_place:
                return part.calls
    return None


def parts_on(module: nn.Module) -> dict[str, PrunedBlock | UNetStage]:
    """The forwards that atedm has put on ``module``, by attribute name."""
    found = {name: module.__dict__.get(name) for name in _FORWARDS}
    return {name: part for name, part in found.items() if isinstance(part, (PrunedBlock, UNetStage))}


def _own_forward(module: nn.Module) -> Any:
    return type(module).forward.__get__(module)


def uninstall(unet: nn.Module) -> None:
    """Remove what is applied. If a forward is no longer atedm's, raise before changing anything."""
    calls = calls_of(unet)
    if calls is None:
        return
    # If another tool has restored the class's own forward, there is nothing to remove.
    installed = [part for part in calls.parts if not runs_its_own_forward(part.module)]
    for part in installed:
        if part not in parts_on(part.module).values():
            raise RuntimeError(
                f"the forward of {part.name} has been replaced since atedm.apply; expected atedm's: undo that first"
            )
    for part in installed:
        module = part.module
        if module.__dict__.get("forward") is not part:
            # An accelerate hook was added after atedm's forward and keeps the forward that it wraps under this name.
            module._old_forward = part.previous or _own_forward(module)
        elif part.previous is None:
            del module.forward
        else:
            module.forward = part.previous
    for module in unet.modules():
        # A copy of a pruned block may have replaced it. A part of another UNet, which shares the module, stays.
        strays = [name for name, part in parts_on(module).items() if part.calls is calls or part.calls.is_of_a_copy]
        if "forward" in strays:
            del module.forward
        if "_old_forward" in strays:
            module._old_forward = _own_forward(module)
    calls.stop_following()
    _EARLIER.setdefault(unet, []).append(calls)
    del _EARLIER[unet][:-_MAX_EARLIER]


def install(target: nn.Module, unet: nn.Module, calls: UNetCalls) -> None:
    """Put ``calls`` on ``unet``. ``target`` is the UNet, or what ``torch.compile`` has wrapped around it."""
    if calls in _EARLIER.get(unet, []):
        _EARLIER[unet].remove(calls)
    for part in calls.parts:
        part.previous = part.module.__dict__.get("forward")
        part.module.forward = part
    hooks = [
        unet.register_forward_pre_hook(calls, with_kwargs=True),
        unet.register_forward_hook(calls.end, with_kwargs=True, always_call=True),
    ]
    undo = _around_graph(target, unet, calls.begin_outside, calls.end_outside)
    calls.following = Following(target, hooks, undo)
    compiled = [unet] if is_compiled(target, unet) else calls.parts.compiled
    if compiled:
        count_graphs(unet, calls, compiled)


def _around_graph(
    target: nn.Module,
    unet: nn.Module,
    before: Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None],
    after: Callable[[bool], None],
) -> list[Callable[[], None]]:
    """Call ``before`` and ``after`` around each run of a graph of the whole ``unet``.

    ``after`` gets True if the run has finished, False if it was interrupted or raised.

    Args:
        target: the object that is called: ``unet``, or the result of ``torch.compile(unet)``.

    Returns:
        Functions that undo this.
    """
    undo: list[Callable[[], None]] = []

    def follow(module: nn.Module, attribute: str) -> None:
        compiled = getattr(module, attribute)

        def followed(*args: Any, **kwargs: Any) -> Any:
            before(unet, args, kwargs)
            output = None
            try:
                output = compiled(*args, **kwargs)
                return output
            finally:  # torch does not call forward hooks after an interrupt
                after(output is not None)

        def restore() -> None:
            if module.__dict__.get(attribute) is followed:
                setattr(module, attribute, compiled)

        setattr(module, attribute, followed)
        undo.append(restore)

    if target is not unet:
        follow(target, "forward")
    if unet._compiled_call_impl is not None:  # set by unet.compile(); its graph includes the hooks
        follow(unet, "_compiled_call_impl")
    return undo


def make_calls(unet: nn.Module, blocks: list[AttentionBlock], options: Options) -> UNetCalls:
    """Return the removed calls that applied the same options, if any, so that compiled graphs stay valid; else new
    ones."""
    modules = [block.module for block in blocks]
    if "reused" in options.steps.kinds:
        modules += [stage for _, stage in stages_of(unet)]
    for calls in _EARLIER.get(unet, []):
        is_of = [part.module for part in calls.parts] == modules
        if calls.options == options and is_of and all(part.is_current for part in calls.parts):
            return calls
    calls = UNetCalls(options)
    calls.parts.blocks = [
        PrunedBlock(block.name, block.module, Place.of(unet, block.name), block.level, block.whole_when_light, calls)
        for block in blocks
    ]
    if "reused" in options.steps.kinds:
        calls.parts.stages = make_stages(unet, calls)
    return calls
