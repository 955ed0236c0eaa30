"""Descriptions of Triton kernel launches.

The tests compile the same descriptions ahead of time, for GPUs that the machine lacks.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Launch:
    """One kernel with its grid, its run-time arguments and its compile-time constants."""

    kernel: Any
    grid: int
    arguments: dict[str, Any]
    constants: dict[str, Any]
    num_warps: int = 4
    num_stages: int = 2
    max_registers: int | None = None

    def options(self, backend: str) -> dict[str, int]:
        """Options for the compiler's ``backend``, ``"cuda"`` or ``"hip"``; only CUDA can limit registers."""
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        if self.max_registers is not None and backend == "cuda":
            options["maxnreg"] = self.max_registers
        return options

    def run(self) -> None:
        options = self.options("hip" if torch.version.hip else "cuda")
        self.kernel[(self.grid,)](**self.arguments, **self.constants, **options)


def run_all(launches: Iterable[Launch], device: torch.device) -> None:
    """Start the kernels in order on the current stream of ``device``, which need not be the current device."""
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        for launch in launches:
            launch.run()


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()
