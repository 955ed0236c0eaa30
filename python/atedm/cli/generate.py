"""``atedm generate``: an image from a Stable Diffusion XL checkpoint, full against pruned."""

from __future__ import annotations

import contextlib
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from atedm.cli.extras import require

if TYPE_CHECKING:
    import torch
    from diffusers import StableDiffusionXLPipeline

DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}

WHY_SLOWER = (
    "Pruning did not pay here: at this size, on this device, choosing and refilling tokens costs more than it saves."
)


def generate(
    prompt: Annotated[str, typer.Argument(help="What the image shows.", show_default=False)],
    model: Annotated[str, typer.Option(help="An SDXL checkpoint: a diffusers folder or a hub id (safetensors only).")],
    negative_prompt: Annotated[str | None, typer.Option(help="What the image should not show.")] = None,
    steps: Annotated[int, typer.Option(min=1, help="Denoising steps.")] = 50,
    guidance: Annotated[float, typer.Option(help="Guidance scale; up to 1 switches it off.")] = 5.0,
    seed: Annotated[int, typer.Option(min=0, help="Of the starting noise, the same on every device.")] = 0,
    size: Annotated[str, typer.Option(help="Pixels: 1024 or WIDTHxHEIGHT such as 1216x832.")] = "1024",
    ratio: Annotated[float, typer.Option(help="Part of the tokens to drop.")] = 0.63,
    levels: Annotated[str | None, typer.Option(help="Levels to prune, such as 2,3 or 3. Default: all.")] = None,
    placement: Annotated[str, typer.Option(help="Where a block is pruned: early or paper.")] = "early",
    ranking: Annotated[str, typer.Option(help="Attention that ranks the tokens: self or cross.")] = "self",
    recovery: Annotated[str, typer.Option(help="Dropped tokens: similarity, zeros or bicubic.")] = "similarity",
    dtype: Annotated[str, typer.Option(help="Of the weights: bf16, fp16 or fp32.")] = "bf16",
    variant: Annotated[str | None, typer.Option(help="Variant of the weight files, such as fp16.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda or cuda:1. Default: cuda where there is one.")] = None,
    output: Annotated[Path, typer.Option(help="Folder for the pictures.")] = Path("outputs/generate"),
    json: Annotated[Path | None, typer.Option(help="File for the figures. Default: comparison.json in it.")] = None,
    compare: Annotated[bool, typer.Option(help="Make the image with the full UNet as well.")] = True,
) -> None:
    """Make an image with any SDXL checkpoint, once full and once pruned; pictures, token masks and a table."""
    check_prompt(prompt, "PROMPT")
    if dtype not in DTYPES:
        raise bad("dtype", f"{dtype!r}; expected one of {', '.join(DTYPES)}")
    report_file = check_output(output, json)
    check_installed()
    settings = {
        **{"ratio": ratio, "levels": _parse_levels(levels), "placement": placement},
        **{"ranking": ranking, "recovery": recovery},
    }
    check_settings(settings)
    width, height = parse_size(size)
    place = parse_device(device)
    with failing_clearly():
        from atedm import comparison

        pipe = load_pipeline(model, dtype, variant, place)
        check_settings(settings, pipe)
        request = comparison.Request(prompt, negative_prompt, steps, guidance, seed, width, height)
        found = comparison.compare(pipe, request, settings, output, with_full=compare)
        described = comparison.describe(request, settings, model=model, dtype=dtype)
        title = f"{model}, {width}×{height}, {steps} steps"
        comparison.write_report(found, place, described, report_file, title, WHY_SLOWER)


def bad(option: str, message: str) -> typer.BadParameter:
    """A usage error that names ``option``; ends the command with exit status 2."""
    return typer.BadParameter(message, param_hint=option if option.isupper() else f"--{option}")


def check_prompt(prompt: str, option: str) -> None:
    if not prompt.strip():
        raise bad(option, "is empty; expected some text")


def check_output(folder: Path, json: Path | None) -> Path:
    """Make sure that results can be written, before anything is computed; returns the file for the figures."""
    file = json or folder / "comparison.json"
    if file.is_dir():
        raise bad("json", f"{file} is a folder; expected a file")
    for option, path in (("output", folder), ("json", file.parent)):
        try:
            path.mkdir(parents=True, exist_ok=True)
            # The mode bits do not tell for a read-only or full file system, so try.
            with tempfile.NamedTemporaryFile(dir=path):
                pass
        except OSError as error:
            raise bad(option, f"cannot write to {path}: {error.strerror or error}") from None
    return file


def check_installed() -> None:
    """Everything that pictures need beyond the plug-in itself; keeps transformers quiet."""
    require("generate", "transformers", "matplotlib", "pillow")
    from transformers.utils import logging

    # Its advice on image processors that are not used here would hide our own lines.
    logging.set_verbosity_error()


def check_settings(settings: dict[str, Any], pipe: StableDiffusionXLPipeline | None = None) -> None:
    """Usage error where :func:`atedm.apply` would refuse ``settings``: in general, or for ``pipe``."""
    import atedm
    from atedm.options import Options

    try:
        Options(**settings)
        if pipe is not None:
            with atedm.applied(pipe, **settings):
                pass
    except (ValueError, TypeError) as error:
        # Most messages begin with the setting's name, which is the option's.
        name = str(error).partition(" ")[0]
        raise bad(name if name in settings else "model", str(error)) from None


def parse_device(text: str | None) -> torch.device:
    """The device named, or the best there is; usage error for one that is unknown or absent."""
    import torch

    if text is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(text)
    except RuntimeError:
        raise bad("device", f"{text!r}; expected cpu, cuda or cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise bad("device", f"{text!r}; expected cpu, cuda or cuda:N")
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            raise bad("device", f"{text!r}; torch sees {count} CUDA devices on this machine")
    return device


@contextlib.contextmanager
def failing_clearly() -> Iterator[None]:
    """A message instead of a traceback for what the user can mend: too little memory, a full disk."""
    import torch

    try:
        yield
    except torch.OutOfMemoryError as error:
        typer.echo(f"Error: out of memory, finished images are kept: {str(error).splitlines()[0]}", err=True)
        raise typer.Exit(1) from None
    except OSError as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(1) from None


def _parse_levels(text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() for part in parts):
        raise bad("levels", f"{text!r}; expected level numbers separated by commas, such as 2,3")
    return tuple(sorted({int(part) for part in parts}))


def parse_size(text: str) -> tuple[int, int]:
    from atedm.models import image_size

    try:
        return image_size(text)
    except ValueError as error:
        raise bad("size", str(error)) from None


def load_pipeline(model: str, dtype: str, variant: str | None, device: torch.device) -> StableDiffusionXLPipeline:
    """The pipeline on ``device``; usage error where ``model`` is none, or not one of SDXL."""
    import torch
    from diffusers import StableDiffusionXLPipeline

    folder = Path(model).expanduser()
    looks_like_path = model.startswith((".", "/", "~")) or model.count("/") != 1
    if folder.is_file():
        raise bad("model", f"{model} is a file; expected a diffusers folder or a hub id")
    if not folder.exists() and looks_like_path:
        raise bad("model", f"{model} does not exist; expected a diffusers folder or a hub id such as owner/name")
    if folder.exists() and not (folder / "model_index.json").is_file():
        raise bad("model", f"{model} holds no model_index.json; expected the folder of a diffusers pipeline")
    source = str(folder) if folder.exists() else model
    try:
        name = StableDiffusionXLPipeline.load_config(source).get("_class_name")
        if not str(name).startswith("StableDiffusionXL"):
            raise bad("model", f"{model} is a {name}; expected a Stable Diffusion XL pipeline")
        with warnings.catch_warnings():
            # New releases of diffusers prefer another name for torch_dtype, older ones know this one only.
            warnings.simplefilter("ignore", FutureWarning)
            pipe = StableDiffusionXLPipeline.from_pretrained(
                source, torch_dtype=getattr(torch, DTYPES[dtype]), variant=variant, use_safetensors=True
            )
    except (OSError, ValueError, TypeError) as error:
        # The first sentence says what is missing; what follows are pages of advice on the hub.
        raise bad("model", f"{model} cannot be loaded: {str(error).strip().splitlines()[0]}") from None
    return pipe.to(device)
