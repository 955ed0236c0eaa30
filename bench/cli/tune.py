"""``atedm-bench tune``: measures tiles on this GPU and writes the fastest into the tables."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import typer

from atedm.cli.checks import bad, check_file, failing_clearly, parse_count


def tune(
    op: Annotated[list[str] | None, typer.Option(help="Only this op. Can be repeated.")] = None,
    tokens: Annotated[str, typer.Option(help="Tokens per map: square numbers, comma-separated.")] = "1024,4096,16384",
    repeats: Annotated[int, typer.Option(min=3, help="Timed runs per tile.")] = 15,
    tables: Annotated[Path | None, typer.Option(help="Folder for the tables. Default: beside the kernels.")] = None,
) -> None:
    """Try every tile for the attention-map kernels on this GPU, and write the fastest into their tables.

    Each candidate must give the right result. It is timed as a CUDA graph with a cold L2 on SDXL's shapes. The fastest
    are tried again with fewer registers and other numbers of programs. If one beats the row in use, rows for all sizes
    measured go into `tiles.json`, for this architecture and Triton version.
    """
    import torch

    from atedm_bench.tune import TUNED, compilers, tune_op
    from atedm_kernels import tiles

    if not torch.cuda.is_available():
        raise typer.BadParameter(f"torch {torch.__version__} finds no GPU here; tuning needs one")
    for name in op or ():
        if name not in TUNED:
            raise bad("op", f"{name!r}; expected one of {', '.join(TUNED)}")
    counts = _counts(tokens)
    paths = {name: tables / name / "tiles.json" if tables else tiles.table_path(name) for name in op or TUNED}
    for path in paths.values():
        check_file("tables", path)
    with failing_clearly(), compilers() as pool:
        for name, path in paths.items():
            tune_op(name, counts, repeats, path, pool, typer.echo)


def _counts(text: str) -> list[int]:
    counts = [parse_count(part.strip()) for part in text.split(",")]
    if not all(count and math.isqrt(count) ** 2 == count for count in counts):
        raise bad("tokens", f"{text!r}; expected comma-separated squares, such as 1024,4096")
    return sorted(counts)
