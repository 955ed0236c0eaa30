"""Without a GPU the Triton kernels run in Triton's interpreter, which must be chosen before triton is imported."""

from __future__ import annotations

import os
import sys

import pytest
import torch

HAS_GPU = torch.cuda.is_available()

if not HAS_GPU and os.environ.get("TRITON_INTERPRET") != "1":
    if "triton.language" in sys.modules:
        raise RuntimeError("triton was imported before tests/kernels/conftest.py: set TRITON_INTERPRET=1")
    os.environ["TRITON_INTERPRET"] = "1"


# After the choice above: this does not load triton, but the next import of a test module may.
from atedm_kernels import native  # noqa: E402


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if HAS_GPU else "cpu")


@pytest.fixture(params=["reference", "native", "triton"])
def backend(request: pytest.FixtureRequest) -> str:
    if request.param == "native":
        if HAS_GPU:
            pytest.skip("native code serves CPU tensors, and these tests take the GPU's")
        if native.why_not() is not None:
            pytest.skip(native.why_not())
    return request.param


@pytest.fixture
def poisoned_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """``torch.empty`` returns NaN or the lowest integer, which exposes reads of unwritten memory."""
    empty = torch.empty

    def poisoned(*size, **options):
        out = empty(*size, **options)
        return out.fill_(float("nan") if out.is_floating_point() else torch.iinfo(out.dtype).min)

    monkeypatch.setattr(torch, "empty", poisoned)
