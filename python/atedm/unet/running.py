"""Which call of which UNet is running in this thread or task. A UNet may call another."""

from __future__ import annotations

from contextvars import ContextVar
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from atedm.unet.calls import UNetCalls
    from atedm.unet.planner import Call

# Each call knows the call that was running when it began.
_running: ContextVar[tuple[UNetCalls, Call] | None] = ContextVar("atedm_call", default=None)


def running(owner: UNetCalls) -> Call | None:
    """The running call, if it belongs to ``owner``; else None."""
    found = _running.get()
    return found[1] if found is not None and found[0] is owner else None


def begin(owner: UNetCalls, call: Call) -> None:
    """Note that ``call`` of ``owner`` runs from now on."""
    call.before = _running.get()
    _running.set((owner, call))


def stop(owner: UNetCalls) -> Call | None:
    """Note that the running call of ``owner`` has ended, and return it; None if there is none."""
    within, found = [], _running.get()
    while found is not None and found[0] is not owner:
        within.append(found[1])
        found = found[1].before
    if found is None:
        return None
    for call in within:  # calls of other UNets that an interrupt has left running
        call.break_off()
    _running.set(found[1].before)
    return found[1]
