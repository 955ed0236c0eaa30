"""Descriptions of Triton kernel launches.

The tests compile the same descriptions ahead of time, for GPUs that the machine lacks.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from atedm_kernels.backends import triton_interprets

# Compiled kernels, by what Triton specialises them for. Triton's own look-up binds, checks and hashes every argument on
# each call, which takes the host longer than most of these kernels take on a GPU.
_compiled: dict[Hashable, Any] = {}


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
        """Start the kernel on the current stream of the current device."""
        run = self._known
        if run is not None:
            run(*self._in_order)
            return
        options = self.options("hip" if torch.version.hip else "cuda")
        compiled = self.kernel[(self.grid,)](**self.arguments, **self.constants, **options)
        if _remembers() and hasattr(compiled, "function"):  # absent while the kernel is still being compiled
            _compiled[self._key] = compiled

    @cached_property
    def _key(self) -> Hashable:
        made_for = map(_specialisation, self.arguments.values())
        sizes = (self.num_warps, self.num_stages, self.max_registers, torch.cuda.current_device())
        return (self.kernel, *made_for, *self.constants.values(), *sizes)

    @property
    def _known(self) -> Callable[..., None] | None:
        """The function that starts the compiled kernel; None before the kernel is compiled."""
        run = self.__dict__.get("_runner")
        if run is None and _remembers():
            compiled = _compiled.get(self._key)
            if compiled is not None:
                run = self.__dict__["_runner"] = compiled[(self.grid, 1, 1)]
        return run

    @cached_property
    def _in_order(self) -> list[Any]:
        values = {**self.arguments, **self.constants}
        return [values[name] for name in self.kernel.arg_names]


def _remembers() -> bool:
    # On AMD, Triton also specialises for the size of a tensor's memory; its debugging tools change how it compiles. The
    # key covers neither.
    return torch.version.hip is None and not triton_interprets() and not _is_debugged()


def _is_debugged() -> bool:
    from triton import knobs

    return bool(knobs.runtime.debug or knobs.compilation.instrumentation_mode)


def _specialisation(value: Any) -> Hashable:
    """The properties of a run-time argument that Triton compiles into a kernel."""
    if isinstance(value, torch.Tensor):
        return value.dtype, value.data_ptr() % 16 == 0
    if type(value) is int:
        return value == 1, value % 16 == 0, -(2**31) <= value < 2**31, value < 2**63
    return type(value)


def run_all(launches: Iterable[Launch], device: torch.device) -> None:
    """Start the kernels in order on the current stream of ``device``, which need not be the current device."""
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        for launch in launches:
            launch.run()


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()
