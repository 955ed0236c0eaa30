"""``atedm-bench quality``: measures what each setting costs in picture quality."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from atedm.cli.checks import (
    MAX_SEED,
    bad,
    check_dtype,
    check_installed,
    check_output,
    fail,
    failing_clearly,
    finite,
    local_model,
    naming_path,
    parse_device,
    parse_list,
    parse_size,
)
from atedm.cli.loading import load_pipeline
from atedm.cli.parameters import AllowPickled, Device
from atedm_extras import missing, require

if TYPE_CHECKING:
    from atedm import Options
    from atedm_bench.quality.session import LabRequest

_PACKAGES = ("transformers", "accelerate", "matplotlib", "pillow", "scipy", "torchmetrics", "tomesd", "DeepCache")


def quality(
    quick: Annotated[bool, typer.Option("--quick", help="A quick check: few pictures, few steps.")] = False,
    images: Annotated[
        int | None,
        typer.Option(
            min=2,
            max=1_000_000,
            help="Pictures per setting. Default: all chosen captions, 256 of the others, all prompts.",
        ),
    ] = None,
    captions: Annotated[
        str | None,
        typer.Option(
            help="chosen: the 64 on which choices were made; held-out: the 256 after those, to report; fresh: those "
            "that no rule was made on. Default: held-out."
        ),
    ] = None,
    scheduler: Annotated[
        str, typer.Option(help="euler, dpm++ (DPM++ 2M) or dpm++-karras; each is compared with its own full model.")
    ] = "euler",
    steps: Annotated[
        int | None,
        typer.Option(min=1, max=100_000, help="Denoising steps. Default: 25 on a CPU, 50 on a GPU or with --model."),
    ] = None,
    guidance: Annotated[
        float | None, typer.Option(callback=finite, help="Guidance scale. Default: 5; with --model 7.")
    ] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Pictures at a time. Default: 32; with --model 1.")] = None,
    settings: Annotated[
        str | None,
        typer.Option(
            help="Names or groups (presets, peers, plane, budget, ablation), comma-separated. Default: all; with "
            "--try, only what is tried."
        ),
    ] = None,
    tried: Annotated[
        list[str] | None,
        typer.Option(
            "--try",
            metavar="NAME=JSON",
            help="One more setting: options of atedm.apply as atedm.Options.save writes them. Can be repeated.",
        ),
    ] = None,
    seed: Annotated[
        int, typer.Option(min=0, max=MAX_SEED, help="Noise seed of the first picture; picture n has seed + n.")
    ] = 0,
    out: Annotated[
        Path | None,
        typer.Option("--output", "--out", help="Folder for pictures, plots and tables; resumes an earlier run there."),
    ] = None,
    json_path: Annotated[
        Path | None, typer.Option("--json", help="File for the rows. Default: quality.json in the folder.")
    ] = None,
    against: Annotated[
        Path | None,
        typer.Option(help="Folder of another run of the same captions, to compare the pictures with."),
    ] = None,
    allow_pickled: AllowPickled = False,
    device: Device = None,
    convergence: Annotated[
        bool,
        typer.Option(help="Also study the power iteration and what refills dropped tokens (embedded model)."),
    ] = True,
    timing: Annotated[bool, typer.Option(help="Also time the UNet in every setting, in turn.")] = True,
    model: Annotated[
        str | None, typer.Option(help="An SDXL checkpoint: folder or hub id. Default: the embedded model.")
    ] = None,
    prompts: Annotated[Path | None, typer.Option(help="With --model: a text file, one prompt per line.")] = None,
    references: Annotated[Path | None, typer.Option(help="With --model: a folder of real pictures, for FID.")] = None,
    size: Annotated[str, typer.Option(help="With --model: size in pixels, 1024 or WIDTHxHEIGHT.")] = "1024",
    dtype: Annotated[str | None, typer.Option(help="bf16, fp16 or fp32. Default: fp32; with --model bf16.")] = None,
    variant: Annotated[str | None, typer.Option(help="With --model: variant of the files, such as fp16.")] = None,
    clip_model: Annotated[
        str, typer.Option(help="With --model: CLIP model for the CLIP score, hub id or folder.")
    ] = "openai/clip-vit-base-patch16",
    fid_features: Annotated[
        str, typer.Option(help="With --model: features for the Fréchet distance: inception, or checker (offline).")
    ] = "inception",
) -> None:
    """Make the same pictures with the full UNet, ours, DeepCache, tomesd and random pruning, and measure what is lost.

    Without --model, it runs the embedded model on drawn scenes, offline, and a checker counts the pictures that show
    what was asked. With --model, --prompts and --references, it runs any SDXL checkpoint, and measures FID and CLIP
    score.

    You can press Ctrl-C at any time: the same command resumes where it stopped. Start it with
    `accelerate launch --no_python atedm-bench quality …` to share the work between several GPUs.
    """
    require("quality", *_PACKAGES)
    check_installed()
    from atedm.app.prompts import own_device
    from atedm_bench.quality import session

    request = session.LabRequest(
        quick=quick,
        images=images,
        steps=steps,
        guidance=guidance,
        batch=batch,
        scheduler=scheduler,
        settings=None if settings is None else parse_list(settings),
        tried=_parsed(tried or []),
        captions=captions,
        seed=seed,
        out=out,
        json=json_path,
        convergence=convergence,
        timing=timing,
        model=model,
        prompts=prompts,
        references=references,
        dtype=dtype,
        clip_model=clip_model,
        fid_features=fid_features,
        allow_pickled=allow_pickled,
        against=against,
    )
    _check(request)
    place = own_device(parse_device(device))
    request = session.resolved(request, place)
    sides = parse_size(size)
    inputs = request.prompts, request.references, request.against
    inputs += tuple(local_model(each) for each in (request.model, request.clip_model) if each is not None)
    check_output(request.out, request.json, *inputs)
    for path in session.figures_beside(request):
        check_output(request.out, path, *inputs)
    if request.model is not None and request.fid_features == "inception" and missing("torch-fidelity"):
        raise bad("fid-features", "inception needs torch-fidelity; pip install torch-fidelity, or expected checker")
    with failing_clearly():
        try:
            if request.model is None:
                session.run_embedded(request, place)
            else:
                pipe = load_pipeline(request.model, request.dtype, variant, place, allow_pickled)
                session.run_checkpoint(request, place, pipe, sides)
        except ValueError as error:
            fail(error, status=2)
        except KeyboardInterrupt:
            typer.echo(f"Interrupted; the same command resumes from the pictures in {request.out}", err=True)
            raise typer.Exit(130) from None


def _parsed(tried: Sequence[str]) -> dict[str, Options]:
    """Return the options of each ``NAME=JSON``, by name."""
    from atedm import Options

    found: dict[str, Options] = {}
    for text in tried:
        name, is_given, options = text.partition("=")
        try:
            if not is_given or name in found:
                raise ValueError("expected NAME=JSON, each name once")
            found[name] = Options.from_dict(json.loads(options))
        except (ValueError, TypeError, RecursionError) as error:
            raise bad("try", f"{text!r}: {error}") from None
    return found


def _check(request: LabRequest) -> None:
    from atedm_bench.quality.lab import CAPTIONS
    from atedm_bench.quality.samplers import SCHEDULERS

    if request.dtype is not None:
        check_dtype(request.dtype)
    if request.scheduler not in SCHEDULERS:
        raise bad("scheduler", f"is {request.scheduler!r}; expected {', '.join(SCHEDULERS)}")
    if request.captions not in (None, *CAPTIONS):
        raise bad("captions", f"is {request.captions!r}; expected {', '.join(CAPTIONS)}")
    if request.captions is not None and request.model is not None:
        raise bad("captions", "is for the embedded model; expected only --prompts with --model")
    if request.model is None:
        for name in ("prompts", "references"):
            if getattr(request, name) is not None:
                raise bad(name, "is for real checkpoints; expected --model too")
        return
    with naming_path("prompts", request.prompts, "read"):
        if request.prompts is None or not request.prompts.is_file():
            raise bad("prompts", f"is {request.prompts}; expected a text file with one prompt per line")
    with naming_path("references", request.references, "read"):
        if request.references is None or not request.references.is_dir():
            raise bad("references", f"is {request.references}; expected a folder of pictures")
    if request.fid_features not in ("inception", "checker"):
        raise bad("fid-features", f"{request.fid_features!r}; expected inception or checker")
