"""Checks that several commands make on their options before anything is computed."""

from __future__ import annotations

import contextlib
import math
import os
import sys
import tempfile
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

# Picture n has the seed of the first picture plus n, and all seeds must fit in 64 bits.
MAX_SEED = 2**63 - 1

# Bytes that a folder for results must have room for. A picture needs more, its figures less.
_MIN_ROOM = 1 << 16


def bad(option: str, message: str) -> typer.BadParameter:
    """A usage error that names ``option``. It ends the command with exit status 2."""
    hint = option if option.isupper() else "--" + option.replace("_", "-")
    return typer.BadParameter(_printable(message), param_hint=hint)


def fail(message: object, status: int = 1) -> NoReturn:
    """Print an error and end the command with exit status ``status``."""
    typer.echo(f"Error: {_printable(str(message))}", err=True)
    raise typer.Exit(status) from None


def _printable(text: str) -> str:
    """``text`` with escapes for characters that would control the terminal; they may come from a stranger's file."""
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)


def finite(value: float | None) -> float | None:
    """Callback of an option: a usage error for NaN and infinity, which range checks may let through."""
    if value is not None and not math.isfinite(value):
        raise typer.BadParameter(f"{value}; expected a finite number")
    return value


def check_prompt(prompt: str, option: str) -> None:
    if not prompt.strip():
        raise bad(option, "is empty; expected some text")
    check_text(prompt, option)


def check_text(text: str, option: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise bad(option, f"is not UTF-8 text: {error}") from None


def check_no_run(folder: Path) -> None:
    """Raise a usage error if ``folder`` holds a run of prompts, whose figures one picture's figures would replace."""
    with naming_path("output", folder):
        is_run = (folder / RUN).exists()
    if is_run:
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
    with naming_path("output", folder):
        _check_links(folder)
    check_json(file, *inputs)
    for place in (file, file.resolve()):  # a link may have any name
        if not place.resolve().is_relative_to(folder.resolve()):
            continue
        if place.name in RECORDS or place.name.endswith(_MADE):
            raise bad("json", f"{file} would take the place of what a run keeps in {folder}; expected another name")
        if not place.suffix and place.parent.resolve() == folder.resolve():
            raise bad("json", f"{file} is a name for a folder of pictures; expected one with an ending, such as .json")
    return file


# The endings of the files that a run makes in its folder besides its records.
_MADE = (".png", ".html", ".kinds.json")


@contextlib.contextmanager
def naming_path(option: str, path: Path | str, what: str = "write to") -> Iterator[None]:
    """Turn what using ``path`` raises into a usage error: no rights, links in a loop, names that are too long.

    ``what``: what is done with the path.
    """
    try:
        yield
    except (OSError, RuntimeError) as error:
        raise bad(option, f"cannot {what} {path}: {getattr(error, 'strerror', None) or error}") from None


def local_model(model: str) -> Path | None:
    """The folder or file that ``model`` names; None if there is none, as for a hub id."""
    with naming_path("model", model, "read"):
        path = Path(model).expanduser()
        return path if path.exists() else None


def check_json(file: Path | None, *inputs: Path | None) -> None:
    """:func:`check_file` of the option ``--json``, if it is given."""
    if file is not None:
        check_file("json", file, *inputs)


def check_file(option: str, file: Path, *inputs: Path | None) -> None:
    """Check that ``file`` can be written without replacing what the run reads, or what a run resumes from."""
    with naming_path(option, file):
        if file.is_dir():
            raise bad(option, f"{file} is a folder; expected a file")
        if RUN in (file.name, file.resolve().name):
            raise bad(option, f"{file} would take the place of a run's record; expected another name")
        for given in inputs:
            if given is not None and file.resolve().is_relative_to(given.resolve()):
                raise bad(option, f"{file} would take the place of what is read from {given}; expected another file")
        if not is_stream(file):
            check_folder(option, file.resolve().parent)
        elif not os.access(file, os.W_OK):
            raise bad(option, f"cannot write to {file}")


def check_folder(option: str, folder: Path) -> None:
    with naming_path(option, folder):
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


def check_steps(steps: int, pipe: StableDiffusionXLPipeline) -> None:
    """Raise a usage error if the scheduler of ``pipe`` refuses so many steps."""
    try:
        pipe.scheduler.set_timesteps(steps)
    except ValueError as error:
        raise bad("steps", str(error)) from None


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

    if text is None:
        text = "cuda" if torch.cuda.is_available() else "cpu"
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
    check_environment(device)
    return device


def check_environment(device: torch.device) -> None:
    """Raise a usage error if an environment variable of atedm has a value that no call on ``device`` could follow."""
    import torch

    from atedm_kernels.native import isa
    from atedm_kernels.registry import OPS

    try:
        for op in OPS.values():
            op.backend_for(device, torch.float32)
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


# What the system and torch say if they cannot allocate on a CPU; and what torch says if a tensor's size overflows.
_NO_MEMORY = ("can't allocate memory", "not enough memory", "Cannot allocate memory")
_OVERFLOW = "Storage size calculation overflowed"


def lacks_memory(error: BaseException) -> bool:
    import torch

    is_known = isinstance(error, (torch.OutOfMemoryError, MemoryError))
    return is_known or any(words in str(error) for words in _NO_MEMORY)


@contextlib.contextmanager
def failing_clearly() -> Iterator[None]:
    """Print a message instead of a traceback for what the user can fix: too little memory, a full disk, NaN."""
    from safetensors import SafetensorError  # weights that are cut off; files.py names a full disk

    import atedm

    try:
        yield
    except (MemoryError, RuntimeError, OSError, FloatingPointError, SafetensorError, atedm.RankedNaN) as error:
        if lacks_memory(error):
            fail("out of memory, finished images are kept: " + str(error).partition("\n")[0])
        if _OVERFLOW in str(error):
            raise typer.BadParameter(f"the size or the batch is larger than any memory: {error}") from None
        if isinstance(error, RuntimeError) and not isinstance(error, atedm.RankedNaN):
            raise
        fail(error)


def parse_list(text: str) -> list[str]:
    """The words of ``text``, which commas separate."""
    return [word.strip() for word in text.split(",") if word.strip()]


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
