"""The native library at every level of instructions that this machine runs."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from atedm_kernels import _native

# The oracle in float64 is that of tests/kernels.
sys.path.append(str(Path(__file__).parents[1] / "kernels"))

LEVELS = ("portable", "avx2", "avx512", "avx512_bf16", "amx")


@pytest.fixture(autouse=True)
def library_is_there() -> None:
    if _native.why_not() is not None:
        pytest.skip(_native.why_not())


@pytest.fixture(params=LEVELS)
def level(request: pytest.FixtureRequest):
    why_not = _native.levels().get(request.param, "not in this build")
    if why_not is not None:
        pytest.skip(f"level {request.param}: {why_not}")
    with _native.forced_level(request.param):
        yield request.param


@pytest.fixture
def threads():
    """``torch.set_num_threads``, undone at the end."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
