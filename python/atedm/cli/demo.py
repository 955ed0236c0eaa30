"""``atedm demo``: full against pruned on a small embedded model, offline."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from atedm.cli.checks import (
    MAX_SEED,
    check_applicable,
    check_installed,
    check_options,
    check_output,
    check_prompt,
    failing_clearly,
    finite,
    parse_device,
    parse_levels,
)

PROMPT = "a small red circle left of a large blue square on a green background"

WHY_SLOWER = "Not faster here: the embedded model is tiny, so what is added to a call outweighs what it saves."


def demo(
    prompt: Annotated[str, typer.Option(help="What the image shows: shapes, their colours and places.")] = PROMPT,
    steps: Annotated[int, typer.Option(min=1, help="Denoising steps.")] = 50,
    images: Annotated[int, typer.Option(min=1, help="Drawn at once, each from noise of its own.")] = 4,
    seed: Annotated[int, typer.Option(min=0, max=MAX_SEED, help="Of the first image's starting noise.")] = 0,
    ratio: Annotated[float, typer.Option(callback=finite, help="Part of the tokens to drop.")] = 0.63,
    levels: Annotated[str, typer.Option(help="Levels to prune, such as 3.")] = "2,3",
    guidance: Annotated[float, typer.Option(callback=finite, help="Guidance scale; up to 1 switches it off.")] = 5.0,
    output: Annotated[Path, typer.Option(help="Folder for the pictures.")] = Path("outputs/demo"),
    json: Annotated[Path | None, typer.Option(help="File for the figures. Default: comparison.json in it.")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:1.")] = "cpu",
) -> None:
    """Make a few images twice, full and pruned, with a small embedded model; no download."""
    check_prompt(prompt, "prompt")
    report_file = check_output(output, json)
    check_installed()
    place = parse_device(device)
    options = check_options(None, {"ratio": ratio, "levels": parse_levels(levels)})
    with failing_clearly():
        from atedm.app import comparison
        from atedm.embedded import ABOUT, embedded_pipeline, unknown_words

        typer.echo(ABOUT)
        unknown = unknown_words(prompt)
        if unknown:
            typer.echo(f"Warning: the embedded model never saw these words: {', '.join(unknown)}", err=True)
        pipe = embedded_pipeline().to(place)
        check_applicable(options, pipe)
        request = comparison.sized(comparison.ImageRequest(prompt, None, steps, guidance, seed, images=images), pipe)
        found = comparison.compare(pipe, request, options, output)
        described = comparison.describe(request, options, model="embedded", dtype="fp32")
        title = f"embedded model, {images} × {request.width}×{request.height}, {steps} steps"
        comparison.write_report(found, place, described, report_file, title, WHY_SLOWER)
