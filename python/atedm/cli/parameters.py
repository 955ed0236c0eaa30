"""The options that several commands share, so that each has only one wording."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from atedm.cli.checks import MAX_SEED, finite

Preset = Annotated[
    str | None,
    typer.Option(help="Preset: quality, fast, paper or paper-dagger. Default: the settings of atedm.apply."),
]
OptionsFile = Annotated[Path | None, typer.Option(help="Read the settings from a file that atedm.Options.save wrote.")]
Ratio = Annotated[
    float | None, typer.Option(callback=finite, help="Fraction of the tokens to drop. Default: from the settings.")
]
Levels = Annotated[
    str | None, typer.Option(help="Levels to prune, such as 2,3 or 3. Default: from the settings, or all.")
]

Placement = Annotated[
    str | None, typer.Option(help="Where a block drops tokens: early, or paper with --recovery similarity.")
]
Ranking = Annotated[
    str | None,
    typer.Option(help="Rank tokens by self-attention (self), cross-attention (cross) or keys. Default: self."),
]
Recovery = Annotated[
    str | None, typer.Option(help="What a dropped token gets: cached (default), similarity, keys, zeros or bicubic.")
]
Grid = Annotated[
    int | None, typer.Option(help="Always keep the tokens where every GRID-th row and column cross. Default: off.")
]
RankEvery = Annotated[int | None, typer.Option(help="Choose tokens only at every n-th step. Default: 1.")]

Steps = Annotated[int, typer.Option(min=1, max=100_000, help="Denoising steps.")]
Guidance = Annotated[float, typer.Option(callback=finite, help="Guidance scale; 1 or less switches guidance off.")]
Seed = Annotated[
    int, typer.Option(min=0, max=MAX_SEED, help="Seed of the noise, the same on every device; prompt n has seed + n.")
]
Size = Annotated[str, typer.Option(help="Image size in pixels: 1024 or WIDTHxHEIGHT such as 1216x832.")]

Dtype = Annotated[str, typer.Option(help="Type of the weights: bf16, fp16 or fp32.")]
Variant = Annotated[str | None, typer.Option(help="Variant of the weight files, such as fp16.")]
AllowPickled = Annotated[bool, typer.Option("--allow-pickled", help="Also read pickled weights, which can run code.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda or cuda:1. Default: cuda if there is a GPU.")]

Pictures = Annotated[Path, typer.Option("--output", help="Folder for the pictures.")]
Comparison = Annotated[
    Path | None, typer.Option("--json", help="File for the figures. Default: comparison.json in the output folder.")
]
