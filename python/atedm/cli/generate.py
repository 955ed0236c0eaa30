"""``atedm generate``: draw with a Stable Diffusion XL checkpoint, full against pruned, or from a file of prompts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from atedm.cli.checks import (
    bad,
    check_applicable,
    check_dtype,
    check_installed,
    check_no_run,
    check_options,
    check_output,
    check_prompt,
    check_steps,
    check_text,
    chosen_settings,
    failing_clearly,
    local_model,
    parse_device,
    parse_levels,
    parse_size,
)
from atedm.cli.loading import load_pipeline
from atedm.cli.parameters import (
    AllowPickled,
    Comparison,
    Device,
    Dtype,
    Grid,
    Guidance,
    Levels,
    OptionsFile,
    Pictures,
    Placement,
    Preset,
    RankEvery,
    Ranking,
    Ratio,
    Recovery,
    Seed,
    Size,
    Steps,
    Variant,
)

if TYPE_CHECKING:
    import torch
    from diffusers import StableDiffusionXLPipeline

    from atedm.app.comparison import ImageRequest
    from atedm.app.prompts import PromptCase
    from atedm.policy.options import Options

WHY_SLOWER = "Not faster here: at this size, on this device, atedm adds more time to a call than it saves."


def generate(
    model: Annotated[str, typer.Option(help="An SDXL checkpoint: a diffusers folder or a hub id (safetensors only).")],
    prompt: Annotated[str | None, typer.Argument(help="What the image shows.", show_default=False)] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(help="Instead of PROMPT: a text file with one prompt per line. Resumes where it stopped."),
    ] = None,
    negative_prompt: Annotated[str | None, typer.Option(help="What the image should not show.")] = None,
    steps: Steps = 50,
    guidance: Guidance = 5.0,
    seed: Seed = 0,
    size: Size = "1024",
    batch: Annotated[int, typer.Option(min=1, help="With --prompts: images at a time.")] = 1,
    preset: Preset = None,
    options: OptionsFile = None,
    ratio: Ratio = None,
    levels: Levels = None,
    placement: Placement = None,
    ranking: Ranking = None,
    recovery: Recovery = None,
    grid: Grid = None,
    rank_every: RankEvery = None,
    dtype: Dtype = "bf16",
    variant: Variant = None,
    allow_pickled: AllowPickled = False,
    device: Device = None,
    output: Pictures = Path("outputs/generate"),
    json: Comparison = None,
    compare: Annotated[
        bool | None, typer.Option(help="Also draw the images with the full UNet. Default: only without --prompts.")
    ] = None,
    explain: Annotated[
        bool, typer.Option("--explain", help="Also write explain.html: images, masks, scores, times and FLOPs.")
    ] = False,
) -> None:
    """Draw one image with any SDXL checkpoint, full and pruned, or one image per prompt of a file.

    With --prompts, start it with `accelerate launch --no_python atedm generate …` to share the prompts between several
    GPUs. If a picture becomes NaN, the others are still made; the command names it at the end and exits with status 1.
    """
    if (prompt is None) == (prompts is None):
        raise bad("PROMPT", "expected either a prompt or --prompts FILE")
    check_dtype(dtype)
    check_text(negative_prompt or "", "negative-prompt")
    if prompts is not None and explain:
        raise bad("explain", "is given with --prompts; expected it with a single PROMPT")
    report_file = check_output(output, json, prompts, options, local_model(model))
    check_installed()
    changes = {"ratio": ratio, "levels": parse_levels(levels), "placement": placement}
    changes |= {"ranking": ranking, "recovery": recovery, "grid": grid, "rank_every": rank_every}
    pruning = check_options(chosen_settings(preset, options), changes)
    width, height = parse_size(size)
    place = parse_device(device)
    from atedm.app import comparison
    from atedm.app.prompts import Sampling

    def load(device: torch.device) -> StableDiffusionXLPipeline:
        return load_pipeline(model, dtype, variant, device, allow_pickled)

    if prompts is not None:
        sampling = Sampling(steps, guidance, width, height, batch, negative_prompt)
        run = {"model": model, "dtype": dtype, "sampling": sampling, "options": pruning, "root": output}
        run |= {"cases": _cases(prompts, seed), "with_full": bool(compare)}
        _generate_many(load, place, run, report_file)
        return
    check_prompt(prompt, "PROMPT")
    check_no_run(output)
    request = comparison.ImageRequest(prompt, negative_prompt, steps, guidance, seed, width, height)
    described = comparison.describe(request, pruning, model=model, dtype=dtype)
    with_full = compare is None or compare
    _generate_one(lambda: load(place), place, request, pruning, described, output, with_full, explain, report_file)


def _cases(prompts: Path, seed: int) -> list[PromptCase]:
    from atedm.app.prompts import PromptCase, read_prompts

    try:
        return [PromptCase(text, seed + n) for n, text in enumerate(read_prompts(prompts))]
    except (OSError, ValueError) as error:
        raise bad("prompts", str(error)) from None


def _generate_one(
    load: Callable[[], StableDiffusionXLPipeline],
    device: torch.device,
    request: ImageRequest,
    pruning: Options,
    described: dict[str, Any],
    output: Path,
    with_full: bool,
    explain: bool,
    report_file: Path,
) -> None:
    from atedm.app import comparison

    title = f"{described['model']}, {request.width}×{request.height}, {request.steps} steps"
    with failing_clearly():
        pipe = load()
        check_applicable(pruning, pipe)
        check_steps(request.steps, pipe)
        found = comparison.compare(pipe, request, pruning, output, with_full=with_full)
        if explain:
            from atedm.app.explain import write_page

            found.files.append(write_page(found, described, device, title, output / "explain.html"))
        comparison.write_report(found, device, described, report_file, title, WHY_SLOWER)


def _generate_many(
    load: Callable[[torch.device], StableDiffusionXLPipeline],
    device: torch.device,
    settings: dict[str, Any],
    report_file: Path,
) -> None:
    """Make the pictures of many prompts. ``settings``: the other fields of :class:`atedm.app.prompts.PromptRun`."""
    from atedm.app import prompts as many
    from atedm.app.run_record import OtherRun

    with failing_clearly():
        device = many.own_device(device)
        run = many.PromptRun(load(device), **settings)
        check_applicable(run.options, run.pipe)
        check_steps(run.sampling.steps, run.pipe)
        try:
            run.make()
        except OtherRun as error:
            raise bad("output", str(error)) from None
        except KeyboardInterrupt:
            typer.echo(f"Interrupted; the same command resumes from the pictures in {run.root}", err=True)
            raise typer.Exit(130) from None
        run.write_report(device, report_file)
        if run.failed:
            typer.echo("Error: some pictures became NaN and were not made; all others were made:", err=True)
            for name, failure in run.failed:
                typer.echo(f"  {name}, {failure.message}: {failure.prompt!r}", err=True)
            typer.echo("Look at these prompts, and at the dtype. The same command tries them again.", err=True)
            raise typer.Exit(1)
