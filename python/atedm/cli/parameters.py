"""The options that several commands share, each in one wording."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from atedm.cli.checks import MAX_SEED, finite

Preset = Annotated[
    str | None,
    typer.Option(help="Settings by name: quality, fast, paper or paper-dagger. Default: those of atedm.apply."),
]
OptionsFile = Annotated[Path | None, typer.Option(help="Settings from a file that atedm.Options.save wrote.")]
Ratio = Annotated[
    float | None, typer.Option(callback=finite, help="Part of the tokens to drop. Default: that of the settings.")
]
Levels = Annotated[
    str | None, typer.Option(help="Levels to prune, such as 2,3 or 3. Default: those of the settings, or all.")
]

Placement = Annotated[
    str | None, typer.Option(help="Where a block is pruned: early, or paper with --recovery similarity.")
]
Ranking = Annotated[str | None, typer.Option(help="What ranks: attention, self (default) or cross, or keys.")]
Recovery = Annotated[
    str | None, typer.Option(help="Dropped tokens: cached (default), similarity, keys, zeros or bicubic.")
]
Grid = Annotated[int | None, typer.Option(help="Always keep where every GRID-th row and column cross. Default: no.")]
RankEvery = Annotated[int | None, typer.Option(help="Choose tokens at every such step only. Default: 1.")]

Steps = Annotated[int, typer.Option(min=1, max=100_000, help="Denoising steps.")]
Guidance = Annotated[float, typer.Option(callback=finite, help="Guidance scale; up to 1 switches it off.")]
Seed = Annotated[
    int,
    typer.Option(
        min=0, max=MAX_SEED, help="Of the starting noise, the same on every device; the n-th prompt has seed + n."
    ),
]
Size = Annotated[str, typer.Option(help="Image size in pixels: 1024 or WIDTHxHEIGHT such as 1216x832.")]

Dtype = Annotated[str, typer.Option(help="Of the weights: bf16, fp16 or fp32.")]
Variant = Annotated[str | None, typer.Option(help="Variant of the weight files, such as fp16.")]
AllowPickled = Annotated[
    bool, typer.Option("--allow-pickled", help="Also read weights that are no safetensors: they can run code.")
]
Device = Annotated[str | None, typer.Option(help="cpu, cuda or cuda:1. Default: cuda where there is one.")]

Pictures = Annotated[Path, typer.Option("--output", help="Folder for the pictures.")]
Comparison = Annotated[
    Path | None, typer.Option("--json", help="File for the figures. Default: comparison.json in it.")
]
