"""The tables of the kernels' tile sizes."""

from __future__ import annotations

import json

import pytest
import torch

from atedm_kernels import tiles
from atedm_kernels.tiles import Tile, tile_for

OPS = ["attention_column_sums", "similarity_source", "weighted_page_rank_cross"]
ARCHITECTURES = {"*", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942"}


def queries(head_dim: int, dtype: torch.dtype = torch.float16, tokens: int = 1024) -> torch.Tensor:
    return torch.empty(1, 1, tokens, head_dim, dtype=dtype, device="meta")


@pytest.mark.parametrize("op", OPS)
def test_tables(op):
    for row in json.loads(tiles.table_path(op).read_text()):
        assert row["architecture"] in ARCHITECTURES
        assert set(row["dtypes"]) <= {"float16", "bfloat16", "float32"}
        for size in ("block_m", "block_n", "num_warps"):
            assert row[size] > 0 and row[size] & (row[size] - 1) == 0
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        for head_dim in (8, 40, 64, 80, 128, 160, 256):
            assert tile_for(op, queries(head_dim, dtype)).block_n >= 16


@pytest.fixture
def table(tmp_path, monkeypatch):
    """Replace every table with a test's rows."""
    monkeypatch.setattr(tiles, "table_path", lambda op: tmp_path / "tiles.json")
    tiles._look_up.cache_clear()
    yield lambda rows: (tmp_path / "tiles.json").write_text(json.dumps(rows))
    tiles._look_up.cache_clear()


def row(block_m: int, **fields: object) -> dict:
    common = {"architecture": "*", "dtypes": ["float16"], "head_dim": 256, "num_warps": 4, "num_stages": 2}
    return {**common, "block_m": block_m, "block_n": 64, **fields}


def test_the_closest_row_is_taken(table):
    minor = tiles.triton_minor()
    table(
        [
            row(16, head_dim=64),
            row(32),
            row(64, architecture="sm_90", queries=1024, triton="0.0"),
            row(128, architecture="sm_90", queries=2048, triton=minor),
        ]
    )
    assert tile_for("any", queries(64)).block_m == 16
    assert tile_for("any", queries(65)).block_m == 32
    with tiles.assume(architecture="sm_90"):
        assert tile_for("any", queries(64)).block_m == 128
        assert tile_for("any", queries(64, tokens=4096)).block_m == 16
        with tiles.assume(any=Tile(256, 64, 4, 1)):
            assert tile_for("any", queries(64)).block_m == 256
            assert tile_for("other", queries(64)).block_m == 128
    with tiles.assume(architecture="sm_80"):
        assert tile_for("any", queries(64)).block_m == 16
    assert tile_for("any", queries(64)).block_m == 16


def test_rows_of_an_older_triton_serve_until_there_are_newer_ones(table):
    table([row(16), row(64, architecture="sm_90", triton="0.0")])
    with tiles.assume(architecture="sm_90"):
        assert tile_for("any", queries(64)).block_m == 64
