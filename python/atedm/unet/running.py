"""Which call of which UNet runs, in this thread or task; a UNet may call another."""

from __future__ import annotations

from contextvars import ContextVar
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from atedm.unet.calls import UNetCalls
    from atedm.unet.planner import Call

# Each call knows what ran before it began.
_running: ContextVar[tuple[UNetCalls, Call] | None] = ContextVar("atedm_call", default=None)


def running(owner: UNetCalls) -> Call | None:
    """The call that runs, if it is one of ``owner``."""
    found = _running.get()
    return found[1] if found is not None and found[0] is owner else None


def begin(owner: UNetCalls, call: Call) -> None:
    """``call`` of ``owner`` runs from now on."""
    call.before = _running.get()
    _running.set((owner, call))


def stop(owner: UNetCalls) -> Call | None:
    """The call of ``owner`` that runs, no longer; None where there is none."""
    within, found = [], _running.get()
    while found is not None and found[0] is not owner:
        within.append(found[1])
        found = found[1].before
    if found is None:
        return None
    for call in within:  # of other UNets, which an interrupt has left
        call.break_off()
    _running.set(found[1].before)
    return found[1]
