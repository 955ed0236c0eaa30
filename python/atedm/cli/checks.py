"""Checks that several commands make on their options before anything is computed."""

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

# The parts of a text-to-image pipeline that read its prompt.
_TEXT = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")

# Picture n has the seed of the first picture plus n, and all seeds must fit in 64 bits.
MAX_SEED = 2**63 - 1

_MAX_PROMPT_TOKENS = 1 << 20  # SDXL takes 77

_TRIAL_SIDE = 512  # pixels: a size that suits every UNet

# Bytes that a folder for results must have room for. A picture needs more, its figures less.
_MIN_ROOM = 1 << 16


def bad(option: str, message: str) -> typer.BadParameter:
    """A usage error that names ``option``. It ends the command with exit status 2."""
    return typer.BadParameter(message, param_hint=option if option.isupper() else "--" + option.replace("_", "-"))


def finite(value: float | None) -> float | None:
    """Callback of an option: a usage error for NaN and infinity, which range checks may let through."""
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
    """Raise a usage error if ``folder`` holds a run of prompts, whose figures one picture's figures would replace."""
    if (folder / RUN).exists():
        raise bad("output", f"{folder} holds the pictures of a run of prompts; expected another folder")


# The most digits of a count: far above what can be computed, and far below what overflows.
_MAX_DIGITS = 9


def parse_count(text: str) -> int | None:
    """The positive whole number in ``text``; None if it is not one."""
    return int(text) if text.isdecimal() and len(text) <= _MAX_DIGITS and int(text) > 0 else None


def check_output(folder: Path, json: Path | None, *inputs: Path | None) -> Path:
    """Check that results can be written, before anything is computed.

    Args:
        inputs: files and folders that the run reads.

    Returns:
        The file for the figures.
    """
    file = json or folder / "comparison.json"
    check_folder("output", folder)
    with _naming_path("output", folder):
        _check_links(folder)
    check_json(file, *inputs)
    if file.resolve().is_relative_to(folder.resolve()) and (file.name in RECORDS or file.name.endswith(_MADE)):
        raise bad("json", f"{file} would take the place of what a run keeps in {folder}; expected another name")
    return file


# The endings of the files that a run makes in its folder besides its records.
_MADE = (".png", ".html", ".kinds.json")


@contextlib.contextmanager
def _naming_path(option: str, path: Path) -> Iterator[None]:
    """Turn what writing to ``path`` raises into a usage error: no rights, links in a loop, names that are too long."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        raise bad(option, f"cannot write to {path}: {getattr(error, 'strerror', None) or error}") from None


def local_model(model: str) -> Path | None:
    """The folder or file that ``model`` names; None if there is none, as for a hub id."""
    path = Path(model).expanduser()
    return path if path.exists() else None


def check_json(file: Path | None, *inputs: Path | None) -> None:
    """Check that figures can be written to ``file`` without replacing what the run reads or resumes from."""
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
        # Mode bits do not show a read-only or full file system, so try to write.
        with tempfile.NamedTemporaryFile(dir=folder) as trial:
            trial.write(bytes(_MIN_ROOM))


def _check_links(folder: Path) -> None:
    """Raise a usage error for a link that leads out of ``folder``, in it or in a folder of pictures inside it: a folder
    from somebody else may have links to anywhere."""
    root = folder.resolve()
    for path in [*root.glob("*"), *root.glob("*/*")]:
        hidden = any(part.startswith(".") for part in path.relative_to(root).parts)
        if path.is_symlink() and not hidden and not path.resolve().is_relative_to(root):
            raise bad("output", f"the link {path} leads out of {folder}, where files may be replaced; expected none")


def check_installed() -> None:
    """Exit if a package that pictures need is missing, and silence transformers' warnings."""
    require("generate", "transformers", "matplotlib", "pillow")
    from transformers.utils import logging

    # Its advice on image processors, which are not used here, would hide atedm's own output.
    logging.set_verbosity_error()


def check_options(base: Options | str | None, changes: Mapping[str, Any]) -> Options:
    """Options from ``base``, changed by those of ``changes`` that are not None; a usage error if one is invalid."""
    from atedm.policy.options import resolve

    try:
        return resolve(base, {name: value for name, value in changes.items() if value is not None})
    except (ValueError, TypeError) as error:
        # The message begins with the option's name.
        name = str(error).partition(" ")[0]
        raise bad("preset" if name == "options" else name, str(error)) from None


def check_applicable(options: Options, pipe: StableDiffusionXLPipeline | UNet2DConditionModel) -> None:
    """Raise a usage error if :func:`atedm.apply` would refuse ``options`` for ``pipe``."""
    import atedm

    try:
        with atedm.applied(pipe, options):
            pass
    except (ValueError, TypeError) as error:
        name = str(error).partition(" ")[0]
        raise bad(name if name in ("ratio", "levels") else "model", str(error)) from None


def chosen_settings(preset: str | None, file: Path | None) -> Options | str | None:
    """The settings that ``--preset`` or ``--options`` names; at most one of the two may be given."""
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
    """The device that ``text`` names, or for None the GPU if there is one, else the CPU.

    Raises a usage error if the device is unknown or missing.
    """
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
    """Raise a usage error if an environment variable of atedm has a value that no call could follow."""
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


# What torch says if it cannot allocate on a CPU, or if a tensor's size overflows.
_NO_MEMORY = ("can't allocate memory", "not enough memory", "Storage size calculation overflowed")


def _end_without_memory(error: BaseException) -> NoReturn:
    first = str(error).partition("\n")[0]
    typer.echo(f"Error: out of memory, finished images are kept: {first}", err=True)
    raise typer.Exit(1) from None


@contextlib.contextmanager
def failing_clearly() -> Iterator[None]:
    """Print a message instead of a traceback for what the user can fix: too little memory, a full disk, NaN."""
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
    """The UNet configuration that ``model`` names; a usage error if it names none."""
    from atedm.app.models import meta_unet, unet_config, unet_inputs

    with _naming(model):
        try:
            config = unet_config(model)
        except ValueError as error:
            raise bad("model", str(error)) from None
        if model != "sdxl":  # that one is known to be right, and the trial would take 1.4 seconds
            # A call on the meta device finds a configuration that makes no UNet, or one that needs other inputs.
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
    """Replace characters that a terminal cannot show by question marks, as an error would lose computed figures."""
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
    """The pipeline on ``device``; a usage error if ``model`` is not an SDXL pipeline.

    ``allow_pickled``: also read weights that are not safetensors. Reading them can run code that they contain.
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
        # New releases of diffusers prefer another name for torch_dtype; older ones know only this one.
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
        # If its files are missing, transformers makes a tokenizer without words and without a length.
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
    """Turn what reading ``model`` raises into a usage error: a damaged file can raise anything, in any library."""
    import torch

    default = torch.get_default_dtype()
    try:
        yield
    except (typer.BadParameter, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        if any(words in str(error) for words in _NO_MEMORY):
            raise
        # The first line says what is wrong; pages of advice on the hub follow.
        first = str(error).strip().partition("\n")[0] or type(error).__name__
        advice = ""
        if "no file named" in first.lower() and "safetensors" in first:
            advice = "; --allow-pickled reads other weights than safetensors"
        elif isinstance(error, OSError) and not Path(model).expanduser().exists():
            advice = (
                "; it is missing or incomplete in the local cache: give a folder, or download it while online "
                "(with HF_HUB_OFFLINE=1 only the cache is used)"
            )
        raise bad("model", f"{model} cannot be loaded: {first}{advice}") from None
    finally:
        torch.set_default_dtype(default)  # diffusers changes it to build a model, and leaves it so if that fails
