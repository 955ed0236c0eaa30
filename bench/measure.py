"""Measures the time, the memory and the op times of one call, on a CPU or a GPU."""

from __future__ import annotations

import ctypes
import gc
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

T = TypeVar("T")

# Interval between samples of the resident memory while a call runs on a CPU.
_SAMPLING_SECONDS = 0.002


def seconds_of(call: Callable[[], object], device: torch.device, before: Callable[[], object] | None = None) -> float:
    """Return the seconds that ``call()`` takes: device time on CUDA, wall time otherwise.

    ``before`` runs first, untimed. On a GPU the host does not wait for it, so the host is ahead when ``call`` begins.
    """
    if device.type != "cuda":
        if before is not None:
            before()
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    with torch.cuda.device(device):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        if before is not None:
            before()
        start.record()
        call()
        end.record()
        end.synchronize()
    return start.elapsed_time(end) / 1e3


def by_turns(items: Sequence[T], round_number: int) -> list[T]:
    """Rotate ``items``: each round starts with another one, so that a slowdown of the machine affects all of them."""
    first = round_number % max(1, len(items))
    return [*items[first:], *items[:first]]


def peak_memory_of(call: Callable[[], object], device: torch.device) -> int:
    """Return the peak bytes during ``call()``, weights included: allocated on CUDA, else resident in this process."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device)
    _release_freed_memory()
    with _ResidentMemory() as memory:
        call()
    return memory.peak


def op_seconds_of(call: Callable[[], object], device: torch.device, namespace: str = "atedm") -> dict[str, float]:
    """Return the seconds spent in each op of ``namespace`` during ``call()``, including what the op calls.

    They are device time on CUDA. The result is empty if the profiler saw no such op or has no device clock.
    """
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profile:
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    clock = "device_time_total" if device.type == "cuda" else "cpu_time_total"
    prefix = f"{namespace}::"
    seconds: dict[str, float] = {}
    for event in profile.key_averages():
        if event.key.startswith(prefix):
            op = event.key.removeprefix(prefix)
            seconds[op] = seconds.get(op, 0.0) + getattr(event, clock) / 1e6
    return seconds if any(seconds.values()) else {}


def _release_freed_memory() -> None:
    """Return freed memory to the system, so that it does not count for the next call."""
    gc.collect()
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
        if trim is not None:
            trim(0)


class Graphs:
    """CUDA graphs, which exclude the host's work. They share one memory pool, as large as the largest graph needs.

    The graphs live as long as this object: torch raises if a pool is used after its last graph is gone.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()
        self._captured: list[torch.cuda.CUDAGraph] = []

    def capture(self, call: Callable[[], object]) -> Callable[[], None]:
        """Capture ``call``, which must have run before, as a graph. Raises if it cannot be captured."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(self._device), torch.cuda.graph(graph, pool=self._pool):
            call()
        self._captured.append(graph)
        return graph.replay


def error_line(error: Exception) -> str:
    """Return one line about ``error``, for the row of a failed measurement."""
    return f"{type(error).__name__}: {(str(error).strip() or repr(error)).splitlines()[0]}"


def attention_backend_of(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> str:
    """Return the name of the kernel that ``scaled_dot_product_attention`` runs for ``q, k, v`` ``[B, H, N, D]``."""
    from torch.nn.attention import SDPBackend

    choice = torch._fused_sdp_choice(q, k, v)
    return next((name.lower() for name, one in SDPBackend.__members__.items() if int(one.value) == choice), str(choice))


class _ResidentMemory:
    """Samples this process's resident memory in a thread while a ``with`` block runs."""

    def __init__(self) -> None:
        import psutil

        self._process = psutil.Process()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self.peak = 0

    def _look(self) -> None:
        self.peak = max(self.peak, self._process.memory_info().rss)

    def _sample(self) -> None:
        while not self._done.wait(_SAMPLING_SECONDS):
            self._look()

    def __enter__(self) -> _ResidentMemory:
        self._look()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()
        self._look()
