"""What compiled graphs read about the call that they run: they cannot look it up."""

from __future__ import annotations

import threading

from atedm.unet.planner import Call

_claims = threading.Lock()


class GraphCall:
    """The one call that the graphs of a UNet, or of its parts, can be told of.

    Attributes:
        call: what they read; torch guards them by its values.
        is_outside: whether the call that runs was told from outside of the UNet, in whose graph the hooks are.
    """

    def __init__(self, kind: str) -> None:
        """``kind``: of the call that a graph reads before any was told."""
        self.call = Call(kind=kind)
        self.is_outside = False
        self._running: tuple[threading.Thread, Call | None] | None = None

    @property
    def running(self) -> Call | None:
        """The call that this thread's graphs run."""
        if self._running is None or self._running[0] is not threading.current_thread():
            return None
        return self._running[1]

    @property
    def is_followed_outside(self) -> bool:
        """Whether this thread's call is followed from outside."""
        return self.is_outside and self.running is not None

    def claim(self) -> None:
        """Make room for a call; one that an interrupt has left is broken off.

        Raises:
            RuntimeError: another thread's graphs run.
        """
        own = threading.current_thread()
        with _claims:
            thread, left = self._running or (own, None)
            if thread is not own and thread.is_alive():
                raise RuntimeError(
                    "two threads call a compiled UNet at the same time, and its graphs can be told of one call; "
                    "expected one thread at a time: give each a UNet of its own. If an interrupt has ended the other "
                    "call, call atedm.apply again"
                )
            self._running, self.is_outside = (own, None), False
        if left is not None:
            left.break_off()

    def release(self) -> None:
        """Give up what :meth:`claim` has taken for a call that cannot begin."""
        if self._running == (threading.current_thread(), None):
            self._running = None

    def tell(self, call: Call, in_graph: bool) -> None:
        """``in_graph``: whether graphs are to run it. If not, a checkpoint may compute parts of it again later."""
        if in_graph:
            self._running = threading.current_thread(), call
        elif self._running is not None:
            return  # another thread's graphs read theirs
        told = self.call
        told.kind, told.slot, told.ranks, told.is_warm = call.kind, call.slot, call.ranks, call.is_warm

    def end(self, call: Call) -> None:
        """``call`` has ended: let go of what is remembered, and of a kind that would compute nonsense without it."""
        if self.running is call:
            self._running, self.is_outside = None, False
        if self.call.slot is call.slot is not None:
            told = self.call
            told.kind, told.slot, told.ranks, told.is_warm = "whole", None, True, False
