"""Measures what the gradients of an op cost a call that records none: the host's time.

torch would call a Python function of every differentiable op to record its gradients, and find that there is nothing to
record. :class:`atedm_kernels.registry.Op` leaves it out. Here each op is compared with itself without a backward.
"""

from __future__ import annotations

import contextlib
import copy
import statistics
import time
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor

from atedm_bench.measure import by_turns, error_line
from atedm_kernels.registry import OPS, Op

BARE = "without a backward"
_CALLS = 100  # timed together: one takes about as long as reading the clock
MAX_ROUNDS = 30


def recording_rows(
    device: torch.device, dtype: torch.dtype, rounds: int, only: Collection[str] = ()
) -> list[dict[str, Any]]:
    """Return a row for each differentiable op and each way to call it, on tensors of a few elements.

    ``seconds`` is the host's time of one call, the median over ``rounds``; on a GPU the kernels run meanwhile.
    ``ratio`` compares it with the op without a backward. An op that fails has one row, of ``name`` and ``error``.

    Args:
        only: names of ops; empty for all.
    """
    rows = []
    for name, arguments in _arguments(device, dtype).items():
        if only and name not in only:
            continue
        try:
            taken = _taken(_ways(OPS[name], arguments), device, rounds)
        except Exception as error:
            rows.append({"name": name, "error": error_line(error)})
            continue
        bare = statistics.median(taken[BARE])
        rows += [
            {
                "name": name,
                "variant": way,
                "seconds": statistics.median(seconds),
                "seconds_low": min(seconds),
                "seconds_high": max(seconds),
                "repeats": rounds,
                "calls": _CALLS,
                "ratio": statistics.median(seconds) / bare,
            }
            for way, seconds in taken.items()
        ]
    return rows


def _taken(ways: dict[str, Callable[[], None]], device: torch.device, rounds: int) -> dict[str, list[float]]:
    """Return the seconds of a call in each round, by way. They take turns."""
    taken: dict[str, list[float]] = {way: [] for way in ways}
    for done in range(-1, rounds):  # the first round warms up
        for way in by_turns(list(ways), done + 1):
            seconds = _seconds_of_a_call(ways[way], device)
            if done >= 0:
                taken[way].append(seconds)
    return taken


def _arguments(device: torch.device, dtype: torch.dtype) -> dict[str, tuple[Tensor | float | None, ...]]:
    generator = torch.Generator(device).manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, device=device).to(dtype)

    x, residual = normal(1, 16, 32), normal(1, 32, 4, 4)
    q, k, v = (normal(1, 2, 16, 16) for _ in range(3))
    index, source = torch.arange(5, device=device)[None], torch.arange(16, device=device)[None]
    found = {
        "attention_with_logsumexp": (q, k, v, None),
        "gather_tokens": (x, index),
        "recover_tokens": (x, source),
        "recover_feature_map": (x, source, residual),
    }
    missing = {name for name, op in OPS.items() if op.is_differentiable} ^ set(found)
    if missing:
        raise AssertionError(f"no arguments for {missing}")
    return found


def _ways(op: Op, arguments: tuple[Any, ...]) -> dict[str, Callable[[], None]]:
    """By name, a function that calls ``op`` ``_CALLS`` times."""
    bare = copy.copy(op)
    bare.is_differentiable = False

    def calling(op: Op, *modes: Callable[[], contextlib.AbstractContextManager]) -> Callable[[], None]:
        def call() -> None:
            with contextlib.ExitStack() as stack:
                for mode in modes:
                    stack.enter_context(mode())
                for _ in range(_CALLS):
                    op(*arguments)

        return call

    return {
        # As torch dispatches an op that has no backward.
        BARE: calling(bare, torch.no_grad, torch._C._AutoDispatchBelowAutograd),
        "no_grad": calling(op, torch.no_grad),
        "inference_mode": calling(op, torch.inference_mode),
    }


def _seconds_of_a_call(calls: Callable[[], None], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    calls()
    return (time.perf_counter() - start) / _CALLS
