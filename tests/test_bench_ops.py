"""``atedm-bench ops``: its competitors compute what the ops compute, its counts are right, its rows are whole."""

from __future__ import annotations

import collections
import dataclasses
import json
import subprocess

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

import atedm_kernels as ops
from atedm_bench.cli import ops as cli_ops
from atedm_bench.cli import unet as cli_unet
from atedm_bench.measure import seconds_of
from atedm_bench.ops import plain, run
from atedm_bench.ops.cases import ATTENTION, OpInputs, attention_case, cases
from atedm_bench.ops.ceilings import Ceilings, measure_ceilings
from atedm_bench.ops.recording import BARE, recording_rows
from atedm_bench.ops.shapes import Shape, Work, shape_of
from atedm_kernels.registry import OPS, Op

CPU = torch.device("cpu")
SHAPE = Shape("96x64", 3, 2, 4, 6, 9)


@pytest.fixture(scope="module")
def inputs() -> OpInputs:
    with ops.backend("reference"):
        return OpInputs(SHAPE, torch.float32, CPU)


def close(got: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-7)


def test_plain_functions_compute_what_the_ops_do(inputs):
    i = inputs
    close(plain.column_sums(i.q, i.k), ops.attention_column_sums(i.q, i.k, i.lse))
    close(plain.weighted_column_sums(i.q, i.k, i.scores), ops.attention_column_sums(i.q, i.k, i.lse, i.scores))
    close(plain.page_rank(i.q, i.k, 3), ops.weighted_page_rank(i.q, i.k, i.lse, max_iterations=3, tolerance=0.0)[0])
    warm = ops.weighted_page_rank(i.q, i.k, i.lse, max_iterations=2, tolerance=0.0, initial=i.scores + 0.1)
    close(plain.page_rank(i.q, i.k, 2, i.scores + 0.1), warm[0])
    cross, _ = ops.weighted_page_rank_cross(i.q, i.text_k, i.text_lse, max_iterations=3, tolerance=0.0)
    close(plain.page_rank_cross(i.q, i.text_k, 3), cross)
    assert torch.equal(plain.select(i.scores, 9), i.index)
    assert torch.equal(plain.source(i.q, i.k, i.index), i.source)
    close(plain.gather(i.x, i.index), i.compact)
    for residual in (i.residual, i.residual_last):
        close(
            plain.recover_feature_map(i.compact, i.source, residual),
            ops.recover_feature_map(i.compact, i.source, residual),
        )
        caches = i.cache.clone(), i.cache.clone()
        close(
            plain.update_feature_map(i.compact, i.index, caches[0], residual),
            ops.update_feature_map(i.compact, i.index, caches[1], residual),
        )
        assert torch.equal(*caches) and not torch.equal(caches[0], i.cache)


def test_inputs_are_spread(inputs):
    logits = inputs.q @ inputs.k.transpose(2, 3) / 8
    assert logits.std().item() == pytest.approx(2.0, rel=0.1)


def test_shapes_are_those_of_sdxl():
    level_2, level_3 = (shape_of(1216, 832, level, 8, 0.63) for level in (2, 3))
    assert (level_2.height, level_2.width, level_2.heads, level_2.channels) == (52, 76, 10, 640)
    assert (level_3.height, level_3.width, level_3.heads, level_3.channels) == (26, 38, 20, 1280)
    assert shape_of(1024, 1024, 3, 2, 0.63).keep == 379
    assert str(level_3) == "B8 H20 N988 D64"


def test_work_is_counted(inputs):
    """B 2, H 20, N 24, D 64, 9 kept, float32; every factor written out."""
    case = {c.name: c.work for c in cases(inputs, 5)}
    attention = attention_case(inputs).work
    assert attention == Work(4 * 2 * 20 * 24 * 24 * 64, 2 * 20 * 24 * 24, 4 * 2 * 20 * 24 * 64 * 4)
    sums = Work(2 * 2 * 20 * 24 * 24 * 64, 2 * 20 * 24 * 24, 2 * 20 * (48 * 64 * 4 + 48 * 4))
    assert case["attention_column_sums"] == sums
    assert case["weighted_page_rank, 5 iterations"] == Work(5 * sums.flops, 5 * sums.exponentials, 5 * sums.bytes)
    assert case["weighted_page_rank, 3 iterations from scores"].flops == 3 * sums.flops
    assert case["weighted_page_rank, stopped after 1 of 5"] == sums
    assert case["weighted_page_rank_cross, 5 iterations"].flops == 5 * 2 * 2 * 2 * 20 * 24 * 77 * 64
    assert case["similarity_source"].flops == 2 * 2 * 20 * 15 * 9 * 64
    assert case["weighted_page_rank_cross, 5 iterations"].exponentials == 2 * 5 * 2 * 20 * 24 * 77
    assert case["similarity_source"].exponentials == 2 * 20 * 15 * 9
    assert case["select_tokens"].bytes == 4 * 2 * 20 * 24 + 8 * 2 * 9
    assert case["gather_tokens"].bytes == 2 * (18 * 1280 * 4 + 8 * 9)
    assert case["recover_tokens"].bytes == 2 * (33 * 1280 * 4 + 8 * 24)
    assert case["recover_feature_map, contiguous"].bytes == 2 * (57 * 1280 * 4 + 8 * 24)
    assert case["update_feature_map, contiguous"].bytes == 2 * ((9 + 15 + 24 + 9 + 24) * 1280 * 4 + 8 * 9)


def test_a_floor_is_the_slowest_part():
    ceilings = Ceilings(flops=100.0, exponentials=10.0, bytes=1.0)
    assert ceilings.floor(Work(1000.0, 50.0, 2.0)) == (10.0, "matrix products")
    assert ceilings.floor(Work(1000.0, 500.0, 2.0)) == (50.0, "exponentials")
    assert ceilings.floor(Work(bytes=3.0)) == (3.0, "memory")


def test_ceilings_are_measured(monkeypatch):
    from atedm_bench.ops import ceilings

    monkeypatch.setattr(ceilings, "_PRODUCT_SIDE", {"cpu": 256})
    monkeypatch.setattr(ceilings, "_COPIED_BYTES", {"cpu": 1 << 22})
    monkeypatch.setattr(ceilings, "_EXPONENTIALS_PER_ELEMENT", {"cpu": 4})
    found = measure_ceilings(CPU, torch.float32)
    assert min(found.flops, found.exponentials, found.bytes) > 1e6


def test_what_runs_before_is_not_timed():
    import time

    order = []
    seconds = seconds_of(lambda: order.append("call"), CPU, lambda: (time.sleep(0.1), order.append("before")))
    assert order == ["before", "call"] and seconds < 0.05


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(run, "measure_ceilings", lambda device, dtype: Ceilings(1e12, 1e10, 1e11))


def test_rows(quick):
    notified: list[str] = []
    settings = run.OpsSettings(
        CPU, (SHAPE,), (torch.float32,), repeats=2, compiled=False, only=("attention_column_sums", "gather_tokens")
    )
    bench = run.OpsBench(settings)
    bench.run(notified.append)
    assert len(notified) == bench.work() == 2
    rows = bench.rows()
    by_name = {(row["name"], row["variant"], row["backend"]): row for row in rows}
    attention = by_name["attention forward", ATTENTION, "flash_attention"]["seconds"]
    assert {row["name"] for row in rows} == {
        "attention forward",
        "attention_column_sums",
        "attention_column_sums, weighted",
        "gather_tokens",
    }
    assert {row["variant"] for row in rows if row["name"] == "gather_tokens"} == {"ours", "plain", "copy"}
    for row in rows:
        assert {"shape", "dtype", "backend", "seconds", "ratio_to_attention", "ratio_to_floor"} <= set(row)
        assert row["seconds_low"] <= row["seconds"] <= row["seconds_high"] and row["repeats"] == 2
        assert row["ratio_to_attention"] == pytest.approx(row["seconds"] / attention)
        assert row["ratio_to_floor"] == pytest.approx(row["seconds"] / row["floor_seconds"])
    copy = by_name["gather_tokens", "copy", "torch"]["seconds"]
    for row in rows:
        expected = None if row["name"] != "gather_tokens" else pytest.approx(row["seconds"] / copy)
        assert row["ratio_to_copy"] == expected
    assert [row["name"] for row in bench.recording] == ["gather_tokens"] * 3


def test_calls_that_record_nothing_are_compared_with_ops_without_a_backward(monkeypatch):
    """Each way calls the op as it says; were a backward to be recorded, the time would show it."""
    seen = []
    call = Op.__call__

    def noted(op, *arguments):
        seen.append((op.name, op.is_differentiable, torch.is_grad_enabled(), torch.is_inference_mode_enabled()))
        return call(op, *arguments)

    monkeypatch.setattr(Op, "__call__", noted)
    rows = recording_rows(CPU, torch.float32, rounds=3)
    differentiable = {name for name, op in OPS.items() if op.is_differentiable}
    assert {row["name"] for row in rows} == differentiable and len(rows) == 3 * len(differentiable)
    ways = {(False, False, False): BARE, (True, False, False): "no_grad", (True, False, True): "inference_mode"}
    calls = collections.Counter((name, ways[tuple(how)]) for name, *how in seen)
    for row in rows:
        assert 0 < row["seconds_low"] <= row["seconds"] <= row["seconds_high"] and row["repeats"] == 3
        assert calls[row["name"], row["variant"]] == 4 * row["calls"]  # one round to warm up
        bare = next(r["seconds"] for r in rows if r["name"] == row["name"] and r["variant"] == BARE)
        assert row["ratio"] == pytest.approx(row["seconds"] / bare)


def test_an_op_that_fails_costs_no_other_its_host_time(monkeypatch):
    call = Op.__call__

    def fails(op, *arguments):
        if op.name == "gather_tokens":
            raise RuntimeError("no kernel\nand more")
        return call(op, *arguments)

    monkeypatch.setattr(Op, "__call__", fails)
    rows = recording_rows(CPU, torch.float32, rounds=1, only=("gather_tokens", "recover_tokens"))
    assert rows[0] == {"name": "gather_tokens", "error": "RuntimeError: no kernel"}
    assert [row["name"] for row in rows[1:]] == ["recover_tokens"] * 3


def test_what_cannot_be_measured_is_said(quick, monkeypatch):
    def no_memory(*_):
        raise RuntimeError("out of memory\nand more")

    with ops.backend("reference"):
        made = OpInputs(SHAPE, torch.float32, CPU)
    monkeypatch.setattr(plain, "column_sums", no_memory)
    settings = run.OpsSettings(CPU, (SHAPE,), (torch.float32,), 5, 1, compiled=False, only=("attention_column_sums",))
    bench = run.OpsBench(settings)
    bench.run()
    failed = [row for row in bench.rows() if "error" in row]
    assert [(row["variant"], row["error"]) for row in failed] == [("plain", "RuntimeError: out of memory")]
    assert any(row["variant"] == "ours" and "seconds" in row for row in bench.rows())
    assert not bench.failed
    monkeypatch.setattr(ops, "select_tokens", no_memory)
    bench = run.OpsBench(dataclasses.replace(settings, only=("select_tokens",)))
    monkeypatch.setattr(run, "OpInputs", lambda *_: made)
    bench.run()
    # One row a backend: where the native library serves the CPU, the reference is measured too.
    assert bench.failed and {row["name"] for row in bench.rows() if "error" in row} == {"select_tokens"}


def test_without_time_shapes_are_named(quick, monkeypatch):
    rounds = []
    settings = run.OpsSettings(
        CPU, (SHAPE, SHAPE), (torch.float32,), repeats=10**9, minutes=1e-9, only=("select_tokens",)
    )
    monkeypatch.setattr(run, "recording_rows", lambda *given: rounds.append(given[2]) or [])
    bench = run.OpsBench(settings)
    bench.run()
    assert bench.settings_for_report()["left_out"] == [
        "float32, 96x64, level 3, batch 2",
        "float32, 96x64, level 3, batch 2, compiled",
        "float32, 96x64, level 3, batch 2, compiled",
    ]
    assert {row["repeats"] for row in bench.rows()} == {3} and rounds == [30]


def test_compiled_rows_are_compared_with_plain_ones(quick, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda call, **_: call)
    bench = run.OpsBench(run.OpsSettings(CPU, (SHAPE,), (torch.float32,), repeats=1, only=("select_tokens",)))
    bench.run()
    rows = {row["variant"]: row for row in bench.rows()}
    assert set(rows) == {"fused attention", "ours", "plain", "plain compiled"}
    compiled, plainly = rows["plain compiled"]["seconds"], rows["plain"]["seconds"]
    assert rows["plain compiled"]["speedup_over_plain"] == pytest.approx(plainly / compiled)


def test_a_run_that_breaks_keeps_its_rows(tmp_path, quick, monkeypatch):
    measure = run.OpsBench._measure

    def breaks(self, shape, *rest):
        if shape.level == 3:
            raise SystemError("the driver is gone")
        measure(self, shape, *rest)

    monkeypatch.setattr(run.OpsBench, "_measure", breaks)
    path = tmp_path / "ops.json"
    result = _run(
        "--device", "cpu", "--dtype", "fp32", "--size", "64", "--repeats", "1", "--no-compile", "--json", str(path)
    )
    assert result.exit_code != 0
    document = json.loads(path.read_text())
    assert {row["level"] for row in document["rows"]} == {2} and not document["settings"]["finished"]


def _run(*arguments: str):
    from atedm_bench.cli import app

    return CliRunner().invoke(app, ["ops", *arguments], env={"TERM": "dumb"})


def test_command_writes_rows_and_a_picture(tmp_path, quick):
    path = tmp_path / "deep" / "ops.json"
    options = ("--device", "cpu", "--dtype", "fp32", "--size", "64", "--batch", "1", "--repeats", "1", "--no-compile")
    result = _run(*options, "--op", "select_tokens", "--op", "similarity_source", "--json", str(path))
    assert result.exit_code == 0, result.output
    document = json.loads(path.read_text())
    assert {"command", "device", "versions", "date", "settings", "rows", "recording"} == set(document)
    assert document["settings"]["finished"] and document["settings"]["ceiling_flops_float32"] == 1e12
    assert {row["level"] for row in document["rows"]} == {2, 3}
    assert path.with_suffix(".png").stat().st_size > 10_000
    assert "similarity_source" in result.output and "B1 H10 N16 D64" in result.output


def test_what_is_no_file_is_written_once_at_the_end(tmp_path, quick, monkeypatch):
    monkeypatch.chdir(tmp_path)
    reader = subprocess.Popen(["cat", "/dev/stdin"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    options = ("--device", "cpu", "--dtype", "fp32", "--size", "64", "--batch", "1", "--repeats", "1", "--no-compile")
    path = f"/proc/self/fd/{reader.stdin.fileno()}"
    result = _run(*options, "--op", "select_tokens", "--json", path)
    assert result.exit_code == 0, result.output
    assert [str(file) for file in tmp_path.rglob("*") if file.is_file()] == [
        str(tmp_path / "outputs/bench-ops-cpu.png")
    ]
    printed, _ = reader.communicate()
    assert json.loads(printed)["settings"]["finished"]


def test_errors_are_printed_as_they_are(capsys):
    text = "cannot read [/usr/lib/x.so], expected [B, C], got [red]"
    row = {"shape": "s", "size": "1", "level": 2, "dtype": "bf16", "name": "n", "variant": "v", "error": text}
    document = {"rows": [row], "settings": {"device": "cpu"}, "device": "d", "recording": [row]}
    console = Console(width=200)
    cli_ops._print(document, console)
    document["settings"] = dict.fromkeys(("model", "size", "batch", "dtype", "memory_format", "rounds"))
    cli_unet._print(document, console)
    assert capsys.readouterr().out.count(text) == 3


@pytest.mark.parametrize(
    ("arguments", "option"),
    [
        (("--dtype", "bf16,int8"), "--dtype"),
        (("--device", "abacus"), "--device"),
        (("--ratio", "1"), "--ratio"),
        (("--size", "1024,1001"), "--size"),
        (("--batch", "0"), "--batch"),
        *(((option, empty), option) for option in ("--dtype", "--size", "--batch") for empty in (",", "")),
        (("--minutes", "-1"), "--minutes"),
        (("--op", "softmax"), "--op"),
    ],
)
def test_errors_name_the_option(arguments, option):
    result = _run("--device", "cpu", *arguments)
    assert result.exit_code == 2
    assert option in result.output
