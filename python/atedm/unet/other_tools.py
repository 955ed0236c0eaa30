"""Find out what other tools have replaced in a UNet."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from torch import nn

from atedm.unet.blocks import unwrapped

if TYPE_CHECKING:
    from atedm.unet.calls import UNetCalls

# diffusers hooks that decide where weights are and which dtype they have, not what is computed. Other hooks, such as
# those that keep attention from an earlier step, may count on all tokens.
_HARMLESS_HOOKS = frozenset(
    {
        "group_offloading",
        "layer_execution_tracker",
        "lazy_prefetch_group_offloading",
        "layerwise_casting",
        "peft_autocast_disable",
    }
)

# The parts of a layer that a tool may replace.
PARTS = ("attn1", "attn2", "ff")


def parts_of(layer: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """A layer and its parts that a tool may replace, each with its name."""
    yield "", layer
    for name in PARTS:
        part = getattr(layer, name, None)
        if part is not None:
            yield f".{name}", unwrapped(part) if name == "ff" else part


def runs_its_own_forward(module: nn.Module, attribute: str = "forward") -> bool:
    """Whether ``module`` runs the forward of its class. A tool that was undone may have left it on the instance."""
    forward = module.__dict__.get(attribute)
    own = getattr(forward, "__func__", None) is type(module).forward and forward.__self__ is module
    return forward is None or own


def _runs_its_own_forward_or_accelerates(module: nn.Module) -> bool:
    """Like :func:`runs_its_own_forward`, but looks under accelerate's hooks, which only move weights and inputs."""
    attribute = _inner_forward(module)
    return attribute is not None and runs_its_own_forward(module, attribute)


def _inner_forward(module: nn.Module) -> str | None:
    """The attribute that holds a module's forward, which differs under accelerate's hook; None if another tool's
    forward is on top."""
    attributes = module.__dict__
    if "_hf_hook" not in attributes:
        return "forward"
    # The hook's forward is a partial.
    outer = getattr(attributes.get("forward"), "func", None)
    return "_old_forward" if getattr(outer, "__module__", None) == "accelerate.hooks" else None


def _forward_on(module: nn.Module) -> Any:
    """The forward that a tool has put on ``module``, maybe under accelerate's hook; None if it cannot be seen."""
    attribute = _inner_forward(module)
    return None if attribute is None else module.__dict__.get(attribute)


def runs_forward(module: nn.Module, forward: Any) -> bool:
    """Whether ``module`` runs ``forward``, maybe under accelerate's hook."""
    return _forward_on(module) is forward


def is_part(forward: object) -> bool:
    """Whether ``forward`` is atedm's: a PrunedBlock or a UNetStage, which cannot be imported here."""
    return hasattr(forward, "runs_when_reused")


def runs_for_another(module: nn.Module, calls: UNetCalls) -> bool:
    """Whether ``module`` runs a forward of atedm's that follows other calls: those of another UNet that shares it."""
    forward = _forward_on(module)
    return is_part(forward) and forward.calls is not calls


def why_stage_replaced(stage: nn.Module) -> str | None:
    """The part of a stage that runs another tool's forward, which may count on running in every step; None if no part
    does."""
    for name in ("resnets", "attentions", "downsamplers", "upsamplers"):
        for n, part in enumerate(stage._modules.get(name) or ()):
            module = unwrapped(part)
            # A forward of atedm's counts as the module's own.
            if not _runs_its_own_forward_or_accelerates(module) and not is_part(_forward_on(module)):
                return f"{name}.{n}"
    return None


def why_not_skippable(module: nn.Module) -> str | None:
    """Why an attention block must run in every step; None if it need not."""
    for i, layer in enumerate(getattr(module, "transformer_blocks", ())):
        for name, part in parts_of(layer):
            reason = why_replaced(i, name, part)
            if reason is not None:
                return reason
    return None


def why_replaced(i: int, name: str, part: nn.Module) -> str | None:
    """What another tool has put on layer ``i``, or on its part ``name``; None if it is diffusers' own."""
    attributes = part.__dict__
    if "_diffusers_hook" in attributes:  # which replaces the forward too
        hooks = set(attributes["_diffusers_hook"].hooks) - _HARMLESS_HOOKS
        if hooks:
            return f"its layer {i}{name} has diffusers' hook {min(hooks)!r}, which may count on all tokens and steps"
    elif not _runs_its_own_forward_or_accelerates(part):
        if i == 0 and name in ("", ".attn1"):
            return "the forward of its first layer or of the self-attention there has been replaced by another tool"
        return f"the forward of its layer {i}{name} has been replaced by another tool"
    return None


def is_diffusers_own(function: Callable[..., Any]) -> bool:
    """Whether diffusers defines ``function``. A wrapper may copy the name and module, so the globals decide."""
    return getattr(function, "__globals__", {}).get("__name__", "").startswith("diffusers.")


def processor_of(attention: nn.Module) -> str:
    """The class name of an attention's processor, marked if its ``__call__`` is not diffusers', as names can clash."""
    kind = type(attention.processor)
    return kind.__name__ if is_diffusers_own(kind.__call__) else f"{kind.__name__} of another tool"
