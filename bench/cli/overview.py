"""``atedm-bench overview``: draws the picture at the top of the README."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from atedm.cli.checks import check_environment, check_file, failing_clearly
from atedm_extras import require


def overview(
    output: Annotated[Path, typer.Option(help="The PNG to write.")] = Path("outputs/overview.png"),
    images: Annotated[int, typer.Option(min=1, max=100, help="How many captions.")] = 6,
) -> None:
    """Draw the embedded model's pictures, full and pruned, and the tokens that it computed at the last pruned step."""
    require("quality", "transformers", "matplotlib", "pillow")
    import torch

    check_environment(torch.device("cpu"))
    check_file("output", output)
    from atedm_bench.overview import write_overview

    with failing_clearly():
        write_overview(output, images)
