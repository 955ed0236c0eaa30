"""``atedm doctor`` passes on working ops and notices a wrong one."""

import json

import pytest
import torch
from typer.testing import CliRunner

import atedm_kernels
from atedm.app.selftest import check_ops
from atedm.cli import app
from atedm_kernels import native
from atedm_kernels.registry import OPS


def test_all_is_well(tmp_path):
    result = CliRunner().invoke(app, ["doctor", "--json", str(tmp_path / "doctor.json")])
    assert result.exit_code == 0, result.output
    document = json.loads((tmp_path / "doctor.json").read_text())
    assert set(document) == {"command", "device", "versions", "date", "settings", "rows"}
    assert {row["name"] for row in document["rows"]} == set(OPS)
    assert all(row["result"] == "ok" for row in document["rows"])


def test_the_native_library_is_reported(monkeypatch, tmp_path):
    # A wide terminal, so that no line is wrapped.
    result = CliRunner().invoke(app, ["doctor", "--json", str(tmp_path / "doctor.json")])
    found = json.loads((tmp_path / "doctor.json").read_text())["settings"]["native"]
    assert f"Native CPU library: {found['library']}" in result.output
    if native.why_not() is None:
        assert native.isa() in found["library"] and found["isas"]["portable"] is None

    monkeypatch.setattr(native, "PATH", tmp_path / "libatedm.so")
    native._load.cache_clear()
    try:
        result = CliRunner().invoke(app, ["doctor"])
    finally:
        native._load.cache_clear()
    assert result.exit_code == 0 and "not in use: libatedm.so was not built" in result.output


@pytest.mark.parametrize("op", sorted(OPS))
def test_a_wrong_op_is_noticed(monkeypatch, op):
    right = getattr(atedm_kernels, op)

    def spoil(x):
        return x.roll(1, dims=-1) if x.dtype == torch.int64 else x * 1.05 + 0.01

    def wrong(*args, **kwargs):
        out = right(*args, **kwargs)
        return (spoil(out[0]), *out[1:]) if isinstance(out, tuple) else spoil(out)

    monkeypatch.setattr(atedm_kernels, op, wrong)
    failed = {check.op for check in check_ops(torch.device("cpu"), torch.float32) if not check.passed}
    assert op in failed
    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == 1


def test_a_crash_is_reported(monkeypatch):
    def crash(*args, **kwargs):
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(atedm_kernels, "gather_tokens", crash)
    # A wide terminal, so that no cell is wrapped.
    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == 1
    assert "no such kernel" in result.output and "did not run" in result.output and "ok" in result.output
