"""The native library with every instruction set that this machine runs."""

from __future__ import annotations

import pytest
import torch

from atedm_kernels import native

ISAS = ("portable", "avx2", "avx512", "avx512_bf16", "amx")


@pytest.fixture(autouse=True)
def library_is_there() -> None:
    if native.why_not() is not None:
        pytest.skip(native.why_not())


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest):
    why_not = native.isas().get(request.param, "not in this build")
    if why_not is not None:
        pytest.skip(f"isa {request.param}: {why_not}")
    with native.forced_isa(request.param):
        yield request.param


@pytest.fixture
def threads():
    """``torch.set_num_threads``, undone at the end."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
