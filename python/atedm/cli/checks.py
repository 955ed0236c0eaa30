"""What several commands ask of their options, before anything is computed."""

from __future__ import annotations

import contextlib
import math
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import typer

from atedm.files import RECORDS, RUN, is_stream
from atedm_extras import require

if TYPE_CHECKING:
    import torch
    from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel

    from atedm.policy.options import Options

DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}

# What a text-to-image pipeline reads its prompt with.
_TEXT = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")

# The n-th picture has the seed of the first and n more, and all must fit in 64 bits.
MAX_SEED = 2**63 - 1

_MAX_PROMPT_TOKENS = 1 << 20  # SDXL takes 77

_TRIAL_SIDE = 512  # pixels, which every UNet divides

# Bytes that a folder for results must have room for: a picture takes more, its figures less.
_MIN_ROOM = 1 << 16


def bad(option: str, message: str) -> typer.BadParameter:
    """A usage error that names ``option``; ends the command with exit status 2."""
    return typer.BadParameter(message, param_hint=option if option.isupper() else "--" + option.replace("_", "-"))


def finite(value: float | None) -> float | None:
    """Callback of an option: usage error for NaN and infinity, which every comparison lets through."""
    if value is not None and not math.isfinite(value):
        raise typer.BadParameter(f"{value}; expected a finite number")
    return value


def check_prompt(prompt: str, option: str) -> None:
    if not prompt.strip():
        raise bad(option, "is empty; expected some text")
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise bad(option, f"is not UTF-8 text: {error}") from None


def check_no_run(folder: Path) -> None:
    """Usage error for the folder of a run of prompts, whose figures one picture's would replace."""
    if (folder / RUN).exists():
        raise bad("output", f"{folder} holds the pictures of a run of prompts; expected another folder")


# Far above all that can be computed, and far below what overflows.
_MAX_DIGITS = 9


def parse_count(text: str) -> int | None:
    """The positive whole number that ``text`` is; None where it is none."""
    return int(text) if text.isdecimal() and len(text) <= _MAX_DIGITS and int(text) > 0 else None


def check_output(folder: Path, json: Path | None, *inputs: Path | None) -> Path:
    """Make sure that results can be written, before anything is computed; returns the file for the figures.

    Args:
        inputs: files and folders that the run reads.
    """
    file = json or folder / "comparison.json"
    check_folder("output", folder)
    with _naming_path("output", folder):
        _check_links(folder)
    check_json(file, *inputs)
    if file.resolve().is_relative_to(folder.resolve()) and (file.name in RECORDS or file.name.endswith(_MADE)):
        raise bad("json", f"{file} would take the place of what a run keeps in {folder}; expected another name")
    return file


# What names end in that a run makes in its folder, beside its records.
_MADE = (".png", ".html", ".kinds.json")


@contextlib.contextmanager
def _naming_path(option: str, path: Path) -> Iterator[None]:
    """A usage error for what a try to write to ``path`` raises: no rights, links in a loop, names that are too long."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        raise bad(option, f"cannot write to {path}: {getattr(error, 'strerror', None) or error}") from None


def local_model(model: str) -> Path | None:
    """The folder or file that ``model`` names; None where there is none, as of a hub id."""
    path = Path(model).expanduser()
    return path if path.exists() else None


def check_json(file: Path | None, *inputs: Path | None) -> None:
    """Make sure that figures can be written to ``file``, and over nothing that the run reads or goes on with."""
    if file is None:
        return
    with _naming_path("json", file):
        if file.is_dir():
            raise bad("json", f"{file} is a folder; expected a file")
        if file.name == RUN:
            raise bad("json", f"{file} would take the place of a run's record; expected another name")
        for given in inputs:
            if given is not None and file.resolve().is_relative_to(given.resolve()):
                raise bad("json", f"{file} would take the place of what is read from {given}; expected another file")
        if not is_stream(file):
            check_folder("json", file.resolve().parent)
        elif not os.access(file, os.W_OK):
            raise bad("json", f"cannot write to {file}")


def check_folder(option: str, folder: Path) -> None:
    with _naming_path(option, folder):
        folder.mkdir(parents=True, exist_ok=True)
        # The mode bits do not tell for a read-only or full file system, so try.
        with tempfile.NamedTemporaryFile(dir=folder) as trial:
            trial.write(bytes(_MIN_ROOM))


def _check_links(folder: Path) -> None:
    """Usage error for a link out of ``folder``, or out of a folder in it, where pictures lie: a stranger's may lead
    anywhere."""
    root = folder.resolve()
    for path in [*root.glob("*"), *root.glob("*/*")]:
        hidden = any(part.startswith(".") for part in path.relative_to(root).parts)
        if path.is_symlink() and not hidden and not path.resolve().is_relative_to(root):
            raise bad("output", f"the link {path} leads out of {folder}, where files may be replaced; expected none")


def check_installed() -> None:
    """Everything that pictures need beyond the plug-in itself; keeps transformers quiet."""
    require("generate", "transformers", "matplotlib", "pillow")
    from transformers.utils import logging

    # Its advice on image processors that are not used here would hide our own lines.
    logging.set_verbosity_error()


def check_options(base: Options | str | None, changes: Mapping[str, Any]) -> Options:
    """Options from ``base`` with those of ``changes`` that are not None; usage error where one does not fit."""
    from atedm.policy.options import resolve

    try:
        return resolve(base, {name: value for name, value in changes.items() if value is not None})
    except (ValueError, TypeError) as error:
        # The message begins with the option's name.
        name = str(error).partition(" ")[0]
        raise bad("preset" if name == "options" else name, str(error)) from None


def check_applicable(options: Options, pipe: StableDiffusionXLPipeline | UNet2DConditionModel) -> None:
    """Usage error where :func:`atedm.apply` would refuse ``options`` for ``pipe``."""
    import atedm

    try:
        with atedm.applied(pipe, options):
            pass
    except (ValueError, TypeError) as error:
        name = str(error).partition(" ")[0]
        raise bad(name if name in ("ratio", "levels") else "model", str(error)) from None


def chosen_settings(preset: str | None, file: Path | None) -> Options | str | None:
    """What the options ``--preset`` and ``--options`` name, of which at most one is given."""
    from atedm.policy.options import Options

    if file is None:
        return preset
    if preset is not None:
        raise bad("preset", "is given with --options; expected one of the two")
    try:
        return Options.load(file)
    except (OSError, ValueError) as error:
        raise bad("options", str(error)) from None


def parse_device(text: str | None) -> torch.device:
    """The device named, or the best there is; usage error for one that is unknown or absent."""
    import torch

    _check_environment()
    if text is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(text)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise bad("device", f"{text!r}; expected cpu, cuda or cuda:N")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise bad("device", f"{text!r}; expected cpu: torch {torch.__version__} finds no GPU here")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise bad("device", f"{text!r}; expected an index under {torch.cuda.device_count()}, the number of GPUs here")
    return device


def _check_environment() -> None:
    """Usage error for a variable of atedm's that no call could obey."""
    from atedm_kernels.backends import forced_backend
    from atedm_kernels.native import isa

    try:
        forced_backend()
        if os.environ.get("ATEDM_CPU"):
            isa()
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


def parse_dtype(text: str) -> torch.dtype:
    import torch

    return getattr(torch, DTYPES[check_dtype(text)])


def check_dtype(text: str) -> str:
    if text not in DTYPES:
        raise bad("dtype", f"{text!r}; expected one of {', '.join(DTYPES)}")
    return text


# What torch says where it cannot allocate on a CPU, and where a tensor's size fits in no number.
_NO_MEMORY = ("can't allocate memory", "not enough memory", "Storage size calculation overflowed")


def _end_without_memory(error: BaseException) -> NoReturn:
    first = str(error).partition("\n")[0]
    typer.echo(f"Error: out of memory, finished images are kept: {first}", err=True)
    raise typer.Exit(1) from None


@contextlib.contextmanager
def failing_clearly() -> Iterator[None]:
    """A message instead of a traceback for what the user can mend: too little memory, a full disk, NaN."""
    import torch

    import atedm

    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        _end_without_memory(error)
    except RuntimeError as error:
        if not any(words in str(error) for words in _NO_MEMORY):
            raise
        _end_without_memory(error)
    except (OSError, FloatingPointError, atedm.RankedNaN) as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(1) from None


def load_config(model: str) -> dict[str, Any]:
    """The UNet configuration that ``model`` names; usage error where it names none."""
    from atedm.app.models import meta_unet, unet_config, unet_inputs

    with _naming(model):
        try:
            config = unet_config(model)
        except ValueError as error:
            raise bad("model", str(error)) from None
        if model != "sdxl":  # which is known to be right: for it the trial takes 1.4 seconds
            # What makes no UNet, or one that needs other inputs, is told here, by a call on the meta device.
            unet = meta_unet(config)
            positional, named = unet_inputs(unet, width=_TRIAL_SIDE, height=_TRIAL_SIDE)
            unet(*positional, **named)
    return config


def parse_levels(text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    parts = [part.strip() for part in text.split(",")]
    levels = {parse_count(part) for part in parts}
    if None in levels:
        raise bad("levels", f"{text!r}; expected level numbers separated by commas, such as 2,3")
    return tuple(sorted(levels))


def use_any_terminal() -> None:
    """What a terminal cannot show becomes a question mark: figures were computed, and an error would lose them."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")


def parse_size(text: str) -> tuple[int, int]:
    from atedm.app.models import image_size

    try:
        return image_size(text)
    except ValueError as error:
        raise bad("size", str(error)) from None


def load_pipeline(
    model: str, dtype: str, variant: str | None, device: torch.device, allow_pickled: bool = False
) -> StableDiffusionXLPipeline:
    """The pipeline on ``device``; usage error where ``model`` is not a pipeline of SDXL.

    ``allow_pickled``: take weights that are no safetensors too. Reading them can run code that they hold.
    """
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
    with _naming(model), warnings.catch_warnings():
        # New releases of diffusers prefer another name for torch_dtype, older ones know this one only.
        warnings.simplefilter("ignore", FutureWarning)
        name = StableDiffusionXLPipeline.load_config(source).get("_class_name")
        if not str(name).startswith("StableDiffusionXL"):
            raise bad("model", f"{model} is a {name}; expected a Stable Diffusion XL pipeline")
        pipe = StableDiffusionXLPipeline.from_pretrained(
            source,
            torch_dtype=getattr(torch, DTYPES[dtype]),
            variant=variant,
            use_safetensors=None if allow_pickled else True,
        )
    missing = [part for part in _TEXT if getattr(pipe, part) is None]
    if missing:
        raise bad("model", f"{model} has no {missing[0]}; expected a text-to-image model (SDXL's refiner is not one)")
    for part in _TEXT[2:]:
        # Where its files are missing, transformers makes a tokenizer that knows no words and no length.
        if getattr(pipe, part).model_max_length > _MAX_PROMPT_TOKENS:
            raise bad("model", f"{model} has an empty {part}; expected its files in a folder of that name")
    channels, of_latent = pipe.unet.config.in_channels, pipe.vae.config.latent_channels
    if channels != of_latent:
        raise bad(
            "model",
            f"{model} has a UNet of {channels} channels, its latents have {of_latent}; expected a text-to-image model "
            "(one for inpainting or editing is not)",
        )
    with _naming(model):  # parts whose weights are missing are on no device
        return pipe.to(device)


@contextlib.contextmanager
def _naming(model: str) -> Iterator[None]:
    """A usage error that names ``model`` for what reading it raises: a damaged file can be anything, to any library."""
    import torch

    default = torch.get_default_dtype()
    try:
        yield
    except (typer.BadParameter, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        if any(words in str(error) for words in _NO_MEMORY):
            raise
        # The first line says what is wrong; what follows are pages of advice on the hub.
        first = str(error).strip().partition("\n")[0] or type(error).__name__
        advice = ""
        if "no file named" in first.lower() and "safetensors" in first:
            advice = "; --allow-pickled reads other weights than safetensors"
        elif isinstance(error, OSError) and not Path(model).expanduser().exists():
            advice = (
                "; it is not in the cache here, or not complete: give a folder, or download it with a network "
                "(HF_HUB_OFFLINE=1 then keeps to the cache)"
            )
        raise bad("model", f"{model} cannot be loaded: {first}{advice}") from None
    finally:
        torch.set_default_dtype(default)  # diffusers changes it while it builds a model, and not back where that fails
