"""What the environment decides: the ISA, and whether there is a library at all."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

import atedm_kernels as ak
from atedm_kernels import native
from atedm_kernels.backends import choose

CODE = """
import torch, atedm_kernels as ak
from atedm_kernels import native
from atedm_kernels.backends import choose
q = torch.eye(8)[None, None]
print(ak.attention_column_sums(q, q, torch.zeros(1, 1, 8)).shape[2], native.isa())
print(choose("select_tokens", ("triton", "native", "reference"), torch.device("cpu"), torch.float32))
"""


def run(**environment: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "ATEDM_BACKEND": "", "TRITON_INTERPRET": "0", **environment}
    return subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, env=environment, timeout=60)


def test_the_library_is_the_default(monkeypatch):
    monkeypatch.delenv("ATEDM_BACKEND", raising=False)
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        assert choose("op", ("triton", "native", "reference"), torch.device("cpu"), dtype)[0] == "native"
    name, why = choose("op", ("triton", "native", "reference"), torch.device("cpu"), torch.float64)
    assert name == "reference" and "float64" in why


def test_an_isa_is_forced():
    done = run(ATEDM_CPU="portable")
    assert done.stdout.startswith("8 portable\n('native'"), done.stderr
    missing = [name for name, reason in native.isas().items() if reason is not None]
    for name, message in [("sse9", "ATEDM_CPU is 'sse9'; expected one of portable, avx2")] + [
        (name, f"ATEDM_CPU is '{name}', which cannot run here") for name in missing[-1:]
    ]:
        done = run(ATEDM_CPU=name)
        assert done.returncode != 0 and f"ValueError: {message}" in done.stderr


def test_levels_are_forced_in_process():
    before = native.isa()
    with native.forced_isa("portable"):
        assert native.isa() == "portable"
    assert native.isa() == before
    with pytest.raises(ValueError, match="isa is 'mmx'; expected one of"), native.forced_isa("mmx"):
        pass


def test_without_the_library_the_reference_serves(monkeypatch, tmp_path):
    monkeypatch.delenv("ATEDM_BACKEND", raising=False)
    monkeypatch.setattr(native, "PATH", tmp_path / "libatedm.so")
    reasons = {"nothing": "was not built", "folder": "cannot be loaded", "text": "cannot be loaded"}
    for found, reason in reasons.items():
        if found == "folder":
            native.PATH.mkdir()
        elif found == "text":
            native.PATH.rmdir()
            native.PATH.write_bytes(b"no library")
        native._load.cache_clear()
        try:
            name, why = choose("op", ("triton", "native", "reference"), torch.device("cpu"), torch.float32)
            assert name == "reference" and reason in why
            assert native.isas() == {} and native.isa() is None and reason in native.describe()
            x, index = torch.rand(1, 3, 2), torch.tensor([[1]])
            assert torch.equal(ak.gather_tokens(x, index), x[:, 1:2])
            with ak.backend("native"), pytest.raises(ValueError, match=reason):
                ak.gather_tokens(x, index)
        finally:
            native._load.cache_clear()


def test_the_report_names_isa_and_threads():
    assert native.isa() in native.describe() and "threads" in native.describe()
