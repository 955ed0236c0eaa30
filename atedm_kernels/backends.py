"""Which implementation of an op serves a call: ``triton``, ``native`` or ``reference``.

Each call chooses by the device and dtype of its tensors. ``ATEDM_BACKEND`` forces a backend for the process,
:func:`backend` for a block of code; the block wins.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import importlib.util
import os
from collections.abc import Collection, Iterator

import torch

from atedm_kernels import native

BACKENDS = ("triton", "native", "reference")

# Dtypes that kernels read. Only the reference serves float64, which exists to verify the others.
KERNEL_DTYPES = (torch.float16, torch.bfloat16, torch.float32)

_forced: contextvars.ContextVar[str | None] = contextvars.ContextVar("atedm_backend", default=None)


def _check_name(name: str, source: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{source} is {name!r}; expected one of {', '.join(BACKENDS)}")
    return name


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """Force the backend of every op called inside the ``with`` block, in this thread.

    Args:
        name: ``"triton"``, ``"native"`` or ``"reference"``.

    Raises:
        ValueError: an unknown name. An op that the forced backend cannot serve raises when it is called.
    """
    token = _forced.set(_check_name(name, "backend name"))
    try:
        yield
    finally:
        _forced.reset(token)


def triton_interprets() -> bool:
    """Whether Triton kernels run in the interpreter (``TRITON_INTERPRET=1``), which takes CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


@functools.cache  # asked at each call of an op
def triton_is_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def _why_not(name: str, implementations: Collection[str], device: torch.device, dtype: torch.dtype) -> str | None:
    """Why backend ``name`` cannot serve the call, or None if it can."""
    if name not in implementations:
        return f"no {name} implementation in this build"
    if name == "reference":
        return None
    if dtype not in KERNEL_DTYPES:
        return f"only the reference serves {dtype}"
    if name == "triton":
        if not triton_is_installed():
            return "triton is not installed"
        if device.type == "cpu" and not triton_interprets():
            return "triton serves CPU tensors only with TRITON_INTERPRET=1"
        if device.type == "cuda" and triton_interprets():
            return "TRITON_INTERPRET=1 is set, so triton kernels do not run on the GPU"
    if name == "native":
        return "native code serves CPU tensors only" if device.type != "cpu" else native.why_not()
    return None


def forced_backend() -> tuple[str | None, str]:
    """The backend forced for this thread or process, or None, and what forces it.

    Raises:
        ValueError: ``ATEDM_BACKEND`` names an unknown backend.
    """
    if _forced.get() is not None:
        return _forced.get(), "atedm_kernels.backend"
    if os.environ.get("ATEDM_BACKEND"):
        return _check_name(os.environ["ATEDM_BACKEND"], "ATEDM_BACKEND"), "ATEDM_BACKEND"
    return None, ""


def choose(op: str, implementations: Collection[str], device: torch.device, dtype: torch.dtype) -> tuple[str, str]:
    """The backend that serves ``op`` for tensors of ``device`` and ``dtype``, and the reason.

    If torch itself has a kernel for the op, ``implementations`` contains ``"torch"``; only forcing the reference
    replaces it.

    Raises:
        ValueError: a forced backend cannot serve the call, or ``ATEDM_BACKEND`` names an unknown one.
    """
    forced, source = forced_backend()
    if "torch" in implementations and forced != "reference":
        return "torch", "torch's own kernel returns every output"
    if forced is not None:
        reason = _why_not(forced, implementations, device, dtype)
        if reason is not None:
            raise ValueError(f"backend {forced!r}, forced by {source}, cannot serve {op}: {reason}")
        return forced, f"forced by {source}"
    # The interpreter is for tests, so a CPU tensor goes there only if the caller forces it.
    order = ("triton", "reference") if device.type == "cuda" else ("native", "reference")
    passed_over = []
    for name in order:
        reason = _why_not(name, implementations, device, dtype)
        if reason is None:
            return name, "; ".join(passed_over) or f"the default for {device.type} tensors"
        passed_over.append(reason)
    raise AssertionError("the reference serves every call")
