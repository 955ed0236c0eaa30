"""Choosing tiles: everything but the timing, which needs a GPU."""

from __future__ import annotations

import contextlib
import errno
import json

import pytest
import torch
from typer.testing import CliRunner

from atedm_bench import tune
from atedm_bench.cli import app
from atedm_kernels import tiles
from atedm_kernels.tiles import Tile

BASE = Tile(64, 128, 4, 3, 512)


def row(architecture: str, queries: int, block_m: int, **fields: object) -> dict:
    common = {"dtypes": ["float16", "bfloat16"], "head_dim": 64, "triton": "3.6"}
    return {"architecture": architecture, "queries": queries, "block_m": block_m, **common, **fields}


def test_candidates_begin_with_what_serves_now():
    found = tune.candidates(BASE)
    assert found[0] == BASE and len(found) == len(set(found)) > 40
    assert tune.candidates(Tile(16, 16, 1, 1))[0] == Tile(16, 16, 1, 1)


def test_finalists_are_tried_with_fewer_registers_and_other_numbers_of_programs():
    finalists = [BASE, Tile(64, 64, 8, 2, 512)]
    found = tune.refinements(finalists)
    assert len(found) == len(set(found)) == len(finalists) * len(tune._REGISTERS) * len(tune._PROGRAMS)
    assert set(finalists) <= set(found)
    assert {(t.block_m, t.block_n, t.num_warps, t.num_stages) for t in found} == {(64, 128, 4, 3), (64, 64, 8, 2)}


def test_tiles_come_fastest_first():
    other, third = Tile(32, 64, 4, 2), Tile(64, 64, 4, 2)
    found = tune.ratio_to(BASE, {BASE: [1.0, 2.0], other: [1.5, 4.0], third: [0.5, 1.0]})
    assert list(found) == [third, BASE, other] and found[other] == pytest.approx(1.75)


def test_a_tile_has_to_gain():
    slower, little, faster = Tile(32, 64, 4, 2), Tile(64, 64, 4, 2), Tile(128, 128, 8, 3)
    seconds = {BASE: [1.0, 2.0], slower: [0.5, 4.0], little: [0.99, 1.98]}
    assert tune.fastest(seconds, BASE) == (BASE, 1.0)
    assert tune.fastest({**seconds, faster: [0.9, 1.6]}, BASE) == (faster, pytest.approx(0.85))


def test_rows_are_renewed_and_ordered():
    everyone = {"architecture": "*", "dtypes": ["float16", "bfloat16"], "head_dim": 64, "block_m": 64}
    table = tune.merge([everyone], row("sm_90", 4096, 1))
    table = tune.merge(table, row("sm_90", 1024, 2))
    table = tune.merge(table, row("sm_80", 4096, 3))
    table = tune.merge(table, row("sm_90", 4096, 4))
    assert [r["block_m"] for r in table] == [3, 2, 4, 64]
    assert len(tune.merge(table, row("sm_90", 4096, 5, triton="3.7"))) == 5
    any_length = {key: value for key, value in row("sm_90", 0, 6).items() if key != "queries"}
    assert [r["block_m"] for r in tune.merge([any_length, everyone], row("sm_90", 4096, 7))] == [7, 6, 64]


def test_a_written_table_is_found(tmp_path, monkeypatch):
    for op in tune.TUNED:
        old = json.loads(tiles.table_path(op).read_text())
        tune.write_table(old, tmp_path / op / "tiles.json")
        assert json.loads((tmp_path / op / "tiles.json").read_text()) == old
        assert (tmp_path / op / "tiles.json").read_text() == tiles.table_path(op).read_text()


def test_wrong_results_disagree():
    sums = torch.rand(2, 3, 8) + 0.1
    assert tune.agree("attention_column_sums", sums * (1 + 1e-5), sums)
    assert not tune.agree("attention_column_sums", sums * (1 + 1e-3), sums)
    assert not tune.agree("attention_column_sums", torch.full_like(sums, float("nan")), sums)
    sources = torch.randint(0, 9, (2, 5000))
    assert tune.agree("similarity_source", sources, sources)
    assert not tune.agree("similarity_source", (sources + 1) % 9, sources)


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what is missing only where there is no GPU")
def test_without_a_gpu_it_says_so():
    result = CliRunner().invoke(app, ["tune"], env={"TERM": "dumb"})
    assert result.exit_code == 2 and "no GPU" in result.output


def tried(monkeypatch, tables, tune_op):
    """The command as on a GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(tune, "compilers", contextlib.nullcontext)
    monkeypatch.setattr(tune, "tune_op", tune_op)
    return CliRunner().invoke(app, ["tune", "--tables", str(tables)])


def test_tables_that_cannot_be_written_are_refused_before_any_tile_is_timed(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    done = tried(monkeypatch, tmp_path / "file", lambda *_: pytest.fail("a tile was timed"))
    assert done.exit_code == 2 and "--tables" in done.stderr and "cannot write to" in done.stderr, done.output


def test_a_disk_that_is_full_by_then_is_no_traceback(tmp_path, monkeypatch):
    def tune_op(name, counts, repeats, path, *_):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    done = tried(monkeypatch, tmp_path / "new", tune_op)
    assert done.exit_code == 1 and "Error: [Errno 28] No space left" in done.stderr, done.output
