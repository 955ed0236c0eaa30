"""``atedm demo``: compare full and pruned on the small embedded model, offline."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from atedm.cli.checks import (
    MAX_SEED,
    check_applicable,
    check_installed,
    check_no_run,
    check_options,
    check_output,
    check_prompt,
    chosen_settings,
    failing_clearly,
    parse_device,
    parse_levels,
)
from atedm.cli.parameters import Comparison, Guidance, Levels, OptionsFile, Pictures, Preset, Ratio, Steps

PROMPT = "a small red circle left of a large blue square on a green background"

WHY_SLOWER = "Not faster here: the embedded model is tiny, so atedm adds more time to a call than it saves."


def demo(
    prompt: Annotated[str, typer.Option(help="What the image shows: shapes, their colours and places.")] = PROMPT,
    steps: Steps = 50,
    images: Annotated[int, typer.Option(min=1, max=65_536, help="How many images to draw at once.")] = 4,
    seed: Annotated[
        int, typer.Option(min=0, max=MAX_SEED, help="Seed of the first image's noise; image n has seed + n.")
    ] = 0,
    preset: Preset = None,
    options: OptionsFile = None,
    ratio: Ratio = None,
    levels: Levels = None,
    guidance: Guidance = 5.0,
    output: Pictures = Path("outputs/demo"),
    json: Comparison = None,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:1.")] = "cpu",
) -> None:
    """Draw a few images twice, full and pruned, with the small model in the package. No download."""
    check_prompt(prompt, "prompt")
    check_no_run(output)
    report_file = check_output(output, json, options)
    check_installed()
    place = parse_device(device)
    pruning = check_options(chosen_settings(preset, options), {"ratio": ratio, "levels": parse_levels(levels)})
    with failing_clearly():
        from atedm.app import comparison
        from atedm.embedded import ABOUT, embedded_pipeline, unknown_words

        unknown = unknown_words(prompt)
        if unknown:
            typer.echo(f"Warning: the embedded model never saw these words: {', '.join(unknown)}", err=True)
        pipe = embedded_pipeline().to(place)
        check_applicable(pruning, pipe)
        request = comparison.sized(comparison.ImageRequest(prompt, None, steps, guidance, seed, images=images), pipe)
        found = comparison.compare(pipe, request, pruning, output)
        described = comparison.describe(request, pruning, model="embedded", dtype="fp32")
        title = f"embedded model, {images} × {request.width}×{request.height}, {steps} steps"
        comparison.write_report(found, place, described, report_file, title, WHY_SLOWER)
        typer.echo(ABOUT)  # last, as the standard output may be closed or full
