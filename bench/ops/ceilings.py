"""Measures the ceilings of this device: matrix products, exponentials, copying. Floors are computed from them."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch

from atedm_bench.measure import seconds_of
from atedm_bench.ops.shapes import Work

_REPEATS = 7

# Sizes that keep every core busy. On a CPU the exponentials fit into the cache; the copy does not.
_PRODUCT_SIDE = {"cpu": 2048, "cuda": 8192}
_COPIED_BYTES = {"cpu": 1 << 28, "cuda": 1 << 30}
_EXPONENTIALS = {"cpu": 1 << 16, "cuda": 1 << 24}
_EXPONENTIALS_PER_ELEMENT = {"cpu": 512, "cuda": 1024}
# Zeroed before each run on a GPU. Meanwhile the host gets ahead, so that the GPU never waits for a launch.
_AHEAD_BYTES = 1 << 28


@dataclass(frozen=True)
class Ceilings:
    """FLOP/s of matrix products in the measured dtype, exponentials per second, bytes read or written per second."""

    flops: float
    exponentials: float
    bytes: float

    def floor(self, work: Work) -> tuple[float, str]:
        """Return the minimum seconds for ``work``, if everything overlaps, and what limits it."""
        parts = {
            "matrix products": work.flops / self.flops,
            "exponentials": work.exponentials / self.exponentials,
            "memory": work.bytes / self.bytes,
        }
        bound = max(parts, key=parts.__getitem__)
        return parts[bound], bound


def _median_seconds(call: Callable[[], object], device: torch.device) -> float:
    before = None
    if device.type == "cuda":
        before = torch.empty(_AHEAD_BYTES, dtype=torch.uint8, device=device).zero_
    call()
    return statistics.median(seconds_of(call, device, before) for _ in range(_REPEATS))


def _exponentials(device: torch.device) -> float:
    """Measure exponentials per second, with the operands in registers (GPU) or in the cache (CPU)."""
    count, each = _EXPONENTIALS[device.type], _EXPONENTIALS_PER_ELEMENT[device.type]
    x = torch.rand(count, device=device)
    if device.type == "cuda":
        from atedm_bench.ops.exponentials import repeated_exp2

        seconds = _median_seconds(lambda: repeated_exp2(x, each), device)
    else:
        out = torch.empty_like(x)

        def call() -> None:
            for _ in range(each):
                torch.exp2(x, out=out)

        seconds = _median_seconds(call, device)
    return count * each / seconds


def measure_ceilings(device: torch.device, dtype: torch.dtype) -> Ceilings:
    """Measure the ceilings. Takes a few seconds on a CPU."""
    side = _PRODUCT_SIDE[device.type]
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    product = torch.empty_like(a)
    flops = 2 * side**3 / _median_seconds(lambda: torch.mm(a, b, out=product), device)
    here = torch.randn(_COPIED_BYTES[device.type] // 4, device=device)
    there = torch.empty_like(here)
    copied = 2 * here.nbytes / _median_seconds(lambda: there.copy_(here), device)
    return Ceilings(flops, _exponentials(device), copied)
