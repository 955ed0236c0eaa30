"""The tile sizes of the kernels over an attention map, looked up in a table beside each kernel.

Each ``tiles.json`` is a list of rows. A row applies to one architecture (``"*"`` for any), to some dtypes, and to head
dims and numbers of queries up to its own. The first row that fits wins. Rows measured with the installed Triton
(``triton`` is its minor version) precede other rows of the same architecture, and those precede ``"*"``.
``atedm-bench tune`` measures and writes rows. A row without ``triton`` was chosen from the compiler's reports.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import json
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path

import torch
import triton
from torch import Tensor


@dataclass(frozen=True)
class Tile:
    """Rows (``block_m``) and columns (``block_n``) per step, and the resources that a step uses.

    Rows are queries and columns are keys, except in ``similarity_source``, where rows are dropped tokens and columns
    are kept tokens. Fewer programs than ``programs`` would leave multiprocessors idle or waiting, so the longer loop is
    then split among several programs. ``max_registers`` is a limit per thread on NVIDIA GPUs. Without it, ptxas may aim
    lower and spill.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    programs: int = 1
    max_registers: int | None = None


# Set by :func:`assume`: the architecture under "architecture", and the tile of an op under the op's name.
_assumed: contextvars.ContextVar[dict[str, str | Tile] | None] = contextvars.ContextVar("atedm_tiles", default=None)


@contextlib.contextmanager
def assume(**values: str | Tile) -> Iterator[None]:
    """In the block, assume ``architecture="sm_90"`` to compile for an absent GPU, or ``<op>=Tile(…)`` to try a tile."""
    token = _assumed.set({**(_assumed.get() or {}), **values})
    try:
        yield
    finally:
        _assumed.reset(token)


@functools.cache
def _device_architecture(index: int) -> str:
    if torch.version.hip:
        return torch.cuda.get_device_properties(index).gcnArchName.split(":")[0]
    major, minor = torch.cuda.get_device_capability(index)
    return f"sm_{major}{minor}"


def architecture(device: torch.device) -> str:
    """``"sm_90"`` or ``"gfx942"``; ``"*"`` without a GPU."""
    assumed = (_assumed.get() or {}).get("architecture")
    if isinstance(assumed, str):
        return assumed
    if device.type != "cuda":
        return "*"
    return _device_architecture(torch.cuda.current_device() if device.index is None else device.index)


def is_amd(device: torch.device) -> bool:
    return architecture(device).startswith("gfx")


def table_path(op: str) -> Path:
    """Path of the tile table of ``op``."""
    return Path(__file__).parent / "ops" / op / "tiles.json"


@functools.cache
def triton_minor() -> str:
    """Minor version of the installed Triton, such as ``"3.6"``."""
    return ".".join(triton.__version__.split(".")[:2])


@functools.cache
def _look_up(op: str, arch: str, dtype: str, head_dim: int, queries: int) -> Tile:
    fitting = [
        row
        for row in json.loads(table_path(op).read_text(encoding="utf-8"))
        if row["architecture"] in (arch, "*")
        and dtype in row["dtypes"]
        and head_dim <= row["head_dim"]
        and queries <= row.get("queries", queries)
    ]
    best = min(fitting, key=lambda row: (row["architecture"] == "*", row.get("triton") != triton_minor()))
    return Tile(**{field.name: best[field.name] for field in fields(Tile) if field.name in best})


def tile_for(op: str, q: Tensor) -> Tile:
    """The tile of ``op`` for queries ``q`` ``[B, H, M, D]``."""
    assumed = (_assumed.get() or {}).get(op)
    if isinstance(assumed, Tile):
        return assumed
    return _look_up(op, architecture(q.device), str(q.dtype).removeprefix("torch."), q.shape[3], q.shape[2])
