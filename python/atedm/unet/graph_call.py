"""What compiled graphs read about the call that they run, because they cannot look it up."""

from __future__ import annotations

import threading

from atedm.unet.planner import Call

_claims = threading.Lock()


class GraphCall:
    """The call that the graphs of a UNet, or of its parts, read: one at a time.

    Attributes:
        call: what the graphs read; torch guards them by its values.
        is_outside: whether the running call was set from outside of the UNet, because the UNet's hooks are in its
            graph.
    """

    def __init__(self, kind: str) -> None:
        """``kind``: what a graph reads as the kind before any call was set."""
        self.call = Call(kind=kind)
        self.is_outside = False
        self._running: tuple[threading.Thread, Call | None] | None = None

    @property
    def running(self) -> Call | None:
        """The call that this thread's graphs run; None if they run none."""
        if self._running is None or self._running[0] is not threading.current_thread():
            return None
        return self._running[1]

    @property
    def is_followed_outside(self) -> bool:
        """Whether this thread's call is followed from outside."""
        return self.is_outside and self.running is not None

    def claim(self) -> None:
        """Make room for a call, and break off a call that an interrupt has left.

        Raises:
            RuntimeError: another thread's graphs are running.
        """
        own = threading.current_thread()
        with _claims:
            thread, left = self._running or (own, None)
            if thread is not own and thread.is_alive():
                raise RuntimeError(
                    "two threads call a compiled UNet at the same time, and its graphs can follow only one; "
                    "expected one thread at a time: give each its own UNet. If an interrupt has ended the other call, "
                    "call atedm.apply again"
                )
            self._running, self.is_outside = (own, None), False
        if left is not None:
            left.break_off()

    def release(self) -> None:
        """Give back the room that :meth:`claim` has made for a call that could not begin."""
        if self._running == (threading.current_thread(), None):
            self._running = None

    def tell(self, call: Call, in_graph: bool) -> None:
        """Make ``call`` the one that is read.

        ``in_graph``: whether graphs run it. Even if not, a checkpoint may compute parts of it again later.
        """
        if in_graph:
            self._running = threading.current_thread(), call
        elif self._running is not None:
            return  # another thread's graphs read theirs
        told = self.call
        told.kind, told.slot, told.ranks, told.is_warm = call.kind, call.slot, call.ranks, call.is_warm

    def end(self, call: Call) -> None:
        """Note that ``call`` has ended. Forget its slot, and its kind, which would compute nonsense without it."""
        if self.running is call:
            self._running, self.is_outside = None, False
        if self.call.slot is call.slot is not None:
            told = self.call
            told.kind, told.slot, told.ranks, told.is_warm = "whole", None, True, False
