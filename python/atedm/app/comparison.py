"""Make the same image with the full and the pruned UNet: pictures, times and FLOPs (``atedm demo``, ``generate``)."""

from __future__ import annotations

import contextlib
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import PIL.Image
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

import atedm
from atedm.app import report
from atedm.app.images import images_of, psnr_db, save_image, unclamped
from atedm.app.models import LATENT_SCALE
from atedm.policy.options import Options
from atedm.policy.selection import kept_tokens
from atedm.unet.blocks import attention_blocks, feature_map_size
from atedm.unet.recording import Recording

if TYPE_CHECKING:
    from diffusers import StableDiffusionXLPipeline
    from PIL.Image import Image

# Minimum number of warm-up steps. A warm-up runs every kind of step once, so that none is timed cold.
WARM_UP_STEPS = 2

# A run counts as disturbed if its calls take on average this many times as long as the fastest call of their kind.
DISTURBED = 2.0

# Fewest tokens that a level should have to be pruned without a memory: as many as level 3 of SDXL has at 1024². On the
# embedded model, the published method leaves 14 % of the pictures right if it prunes the 256 tokens of level 2, and
# 59 % if it prunes only level 3.
MIN_TOKENS_TO_COPY = 1024

COLUMNS = {
    "name": "UNet",
    "unet_seconds": "seconds, all calls",
    "seconds_per_call": "seconds per call",
    "tflops": "TFLOPs per call, 1 image",
    "speedup": "speed-up",
    "psnr_db": "PSNR against full, dB",
}


@dataclass(frozen=True)
class ImageRequest:
    """The images to make. ``guidance`` above 1 doubles the batch of a UNet call.

    ``seed``: seed of the first image's noise; image ``n``, from 0, has ``seed + n``. ``images``: number of images of
    the prompt, made in one batch. ``width``, ``height``: in pixels; None for the pipeline's native side, see
    :func:`sized`.
    """

    prompt: str
    negative_prompt: str | None = None
    steps: int = 50
    guidance: float = 5.0
    seed: int = 0
    width: int | None = None
    height: int | None = None
    images: int = 1


@dataclass
class Generated:
    """The result of one run. ``call_seconds``: seconds of each UNet call. ``batch``: number of rows of a call."""

    images: list[Image]
    call_seconds: list[float]
    batch: int

    @property
    def image(self) -> Image:
        """The images side by side."""
        if len(self.images) == 1:
            return self.images[0]
        return PIL.Image.fromarray(np.concatenate([np.asarray(image) for image in self.images], axis=1))


@dataclass
class Comparison:
    """The result of :func:`compare`.

    Attributes:
        rows: flat, as in the JSON. files: all files written. advice: a line about the pictures, or None.
    """

    rows: list[dict[str, Any]] = field(default_factory=list)
    recording: Recording | None = None
    files: list[Path] = field(default_factory=list)
    advice: str | None = None


class UNetTimer:
    """Times every call of a UNet while the ``with`` block runs. On a GPU it synchronises around each call."""

    def __init__(self, unet: torch.nn.Module) -> None:
        self.unet = unet
        self.seconds: list[float] = []
        self.batch = 0

    def __enter__(self) -> UNetTimer:
        # The first and the last hook, so that the time to follow the schedule counts as part of the call.
        self._handles = [
            self.unet.register_forward_pre_hook(self._start, prepend=True),
            self.unet.register_forward_hook(self._stop),
        ]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _now(self) -> float:
        if self.unet.device.type == "cuda":
            torch.cuda.synchronize(self.unet.device)
        return time.perf_counter()

    def _start(self, unet: torch.nn.Module, args: tuple[Any, ...]) -> None:
        self.batch = args[0].shape[0]
        self._started = self._now()

    def _stop(self, unet: torch.nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self.seconds.append(self._now() - self._started)


def sized(request: ImageRequest, pipe: StableDiffusionXLPipeline) -> ImageRequest:
    """``request`` with the size that ``pipe`` was trained for wherever the request has none."""
    side = pipe.unet.config.sample_size * pipe.vae_scale_factor
    return replace(request, width=request.width or side, height=request.height or side)


def generate_image(
    pipe: StableDiffusionXLPipeline, request: ImageRequest, on_step: Callable[[], None] = lambda: None
) -> Generated:
    """Run ``pipe`` once; ``on_step`` is called after each denoising step."""
    request = sized(request, pipe)
    with UNetTimer(pipe.unet) as timer, unclamped(pipe):
        images = images_of(pipe, _run(pipe, request, on_step, output_type="pt").images)
    if None in images:
        raise FloatingPointError(
            f"{images.count(None)} of {len(images)} pictures have pixels that are not finite; expected numbers: look "
            "at the dtype, and at the prompt"
        )
    return Generated(images, timer.seconds, timer.batch)


def _run(
    pipe: StableDiffusionXLPipeline, request: ImageRequest, on_step: Callable[[], None] = lambda: None, **overrides: Any
) -> Any:
    def after_step(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        on_step()
        return tensors

    arguments = {
        "prompt": request.prompt,
        "negative_prompt": request.negative_prompt,
        "num_inference_steps": request.steps,
        "guidance_scale": request.guidance,
        "width": request.width,
        "height": request.height,
        # Drawn on the CPU, so that a seed gives the same noise on every device.
        "generator": [torch.Generator().manual_seed(request.seed + n) for n in range(request.images)],
        "num_images_per_prompt": request.images,
        "callback_on_step_end": after_step,
    }
    pipe.set_progress_bar_config(disable=True)  # atedm's own progress bars replace it
    return pipe(**{**arguments, **overrides})


def compare(
    pipe: StableDiffusionXLPipeline,
    request: ImageRequest,
    options: Options,
    folder: Path,
    *,
    with_full: bool = True,
    console: Console | None = None,
) -> Comparison:
    """Make the image with the full UNet (``full.png``) and with the pruned one (``pruned.png``, ``tokens.png``).

    Both runs start warm. Each picture is written as soon as it is made, so that a later failure cannot lose it.

    Args:
        options: options of :func:`atedm.apply`; ``pipe`` is unpruned again afterwards.
        folder: an existing folder for the pictures.
        with_full: False skips the full run; ``speedup`` and ``psnr_db`` are then None.
        console: where the progress bars go; standard error by default.

    Raises:
        ValueError, TypeError: options that :func:`atedm.apply` refuses, before anything is computed.
        OSError: a picture cannot be written.
    """
    from atedm.app import pictures

    request = sized(request, pipe)
    with atedm.applied(pipe, options):
        pass  # refuse the options, if at all, before anything is computed
    result = Comparison()
    full = None

    def keep(name: str, write: Callable[[Path], None]) -> None:
        write(folder / name)
        result.files.append(folder / name)

    warm_up = warm_up_kinds(options)
    with _progress(console) as progress:
        if with_full:
            _warm_up(pipe, request, progress, "full", len(warm_up))
            full = _timed(pipe, request, progress, "full")
            keep("full.png", lambda path: save_image(full.image, path))
        with atedm.applied(pipe, options, schedule=warm_up):
            _warm_up(pipe, request, progress, "pruned", len(warm_up))
        with atedm.applied(pipe, options):
            # On a CPU, recording tokens is cheap. On a GPU it copies tensors, so it gets a separate, untimed run.
            free = pipe.unet.device.type == "cpu"
            with atedm.record(pipe, tokens=free) as recording:
                pruned = _timed(pipe, request, progress, "pruned")
            kinds = recording.kinds
            keep("pruned.png", lambda path: save_image(pruned.image, path))
            if not free:
                recording = _recorded(pipe, request, progress)
    result.recording = recording
    keep("tokens.png", lambda path: pictures.plot(recording, pruned.images[-1], path=path))

    flops = tflops_of(pipe, request.width, request.height, options, kinds)
    row = _row("pruned", pruned, kinds, pipe, request, flops["pruned"], options)
    if full is not None:
        whole = ["whole"] * len(full.call_seconds)
        result.rows.append({**_row("full", full, whole, pipe, request, flops["full"]), "speedup": 1.0})
        row["speedup"] = sum(full.call_seconds) / sum(pruned.call_seconds)
        row["psnr_db"] = psnr_db(pruned.image, full.image)
    result.rows.append(row)
    result.advice = advice(options, token_counts(pipe, request.width, request.height))
    return result


def token_counts(pipe: StableDiffusionXLPipeline, width: int, height: int) -> dict[int, int]:
    """Number of tokens at each level that has attention, for a size in pixels."""
    latent = (height // pipe.vae_scale_factor, width // pipe.vae_scale_factor)
    levels = sorted({block.level for block in attention_blocks(pipe.unet)})
    return {level: math.prod(feature_map_size(level, *latent)) for level in levels}


def _ratio(options: Options, level: int) -> float:
    prunes = options.prunes and (options.levels is None or level in options.levels)
    return options.ratio_at(level) if prunes else 0.0


def advice(options: Options, tokens: dict[int, int]) -> str | None:
    """A line of advice if ``options`` prune a level with too few ``tokens``; else None."""
    pruned = [level for level in tokens if _ratio(options, level) > 0]
    if len(pruned) < 2 or options.remembers or tokens[pruned[0]] >= MIN_TOKENS_TO_COPY:
        return None
    return (
        f"Level {pruned[0]} has only {tokens[pruned[0]]} tokens here, too few to prune without a memory: "
        f"--levels {','.join(map(str, pruned[1:]))} leaves it whole."
    )


@contextlib.contextmanager
def _progress(console: Console | None) -> Iterator[Progress]:
    columns = (
        TextColumn("{task.description:<24}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, TimeRemainingColumn(), console=console or Console(stderr=True)) as progress:
        yield progress


def warm_up_kinds(options: Options) -> list[str]:
    """A schedule that has every kind of step of ``options`` once, and at least ``WARM_UP_STEPS`` steps."""
    found = [kind for kind in atedm.KINDS if kind in options.kinds]
    return found + found[-1:] * (WARM_UP_STEPS - len(found))


def _warm_up(pipe: StableDiffusionXLPipeline, request: ImageRequest, progress: Progress, name: str, steps: int) -> None:
    task = progress.add_task(f"{name}: warm-up", total=steps)
    _run(pipe, request, lambda: progress.advance(task), num_inference_steps=steps, output_type="latent")


def _timed(pipe: StableDiffusionXLPipeline, request: ImageRequest, progress: Progress, name: str) -> Generated:
    task = progress.add_task(f"{name}: denoising", total=request.steps)
    return generate_image(pipe, request, lambda: progress.advance(task))


def _recorded(pipe: StableDiffusionXLPipeline, request: ImageRequest, progress: Progress) -> Recording:
    """Record the token masks in a separate run, without making its picture."""
    task = progress.add_task("pruned: token masks", total=request.steps)
    with atedm.record(pipe) as recording:
        _run(pipe, request, lambda: progress.advance(task), output_type="latent")
    return recording


def tflops_of(
    pipe: StableDiffusionXLPipeline, width: int, height: int, options: Options, kinds: Sequence[str] | Counter[str]
) -> dict[str, float]:
    """Mean TFLOPs of a UNet call for one image, over steps of these ``kinds``, as ``full`` and ``pruned``."""
    from atedm.app.flops import UNetFlops

    # The counter expects pixels of an autoencoder with SDXL's scale.
    width, height = (side * LATENT_SCALE // pipe.vae_scale_factor for side in (width, height))
    tokens = pipe.tokenizer_2.model_max_length
    counter = UNetFlops(dict(pipe.unet.config), width=width, height=height, tokens=tokens)
    return {"full": counter.full().tflops, "pruned": counter.mean(options, kinds).tflops}


def _row(
    name: str,
    run: Generated,
    kinds: Sequence[str],
    pipe: StableDiffusionXLPipeline,
    request: ImageRequest,
    tflops: float,
    options: Options | None = None,
) -> dict[str, Any]:
    calls = len(run.call_seconds)
    row: dict[str, Any] = {
        "name": name,
        "image": f"{name}.png",
        "steps": request.steps,
        "unet_calls": calls,
        "batch": run.batch,
        "unet_seconds": sum(run.call_seconds),
        "seconds_per_call": sum(run.call_seconds) / calls,
        "undisturbed_seconds_per_call": _undisturbed(run.call_seconds, kinds),
        "tflops": tflops,
        "tflops_per_image": tflops * run.batch * calls / request.images,
        "speedup": None,
        "psnr_db": None,
    }
    for level, tokens in token_counts(pipe, request.width, request.height).items():
        ratio = 0.0 if options is None else _ratio(options, level)
        row[f"kept_tokens_level_{level}"] = kept_tokens(tokens, ratio, options.keep_multiple if ratio > 0 else 1)
    return row


def describe(request: ImageRequest, options: Options, **more: Any) -> dict[str, Any]:
    """The ``settings`` of the JSON report: the request, the pruning as applied, and ``more``."""
    return {**more, **asdict(request), **options.to_dict(), "warm_up_steps": len(warm_up_kinds(options))}


def _undisturbed(seconds: Sequence[float], kinds: Sequence[str]) -> float:
    """The mean seconds per call of these ``kinds``, if each call took as long as the fastest of its kind."""
    fastest: dict[str, float] = {}
    for taken, kind in zip(seconds, kinds, strict=True):
        fastest[kind] = min(taken, fastest.get(kind, taken))
    return sum(fastest[kind] for kind in kinds) / len(kinds)


def is_disturbed(row: dict[str, Any]) -> bool:
    """Whether something else was using the machine while the run of ``row`` was timed."""
    return row["seconds_per_call"] > DISTURBED * row["undisturbed_seconds_per_call"]


def write_report(
    comparison: Comparison, device: torch.device, settings: dict[str, Any], path: Path, title: str, why_slower: str
) -> None:
    """Print the table, write the JSON to ``path`` and print the path of every file.

    Args:
        why_slower: the line to print if the pruned run was not faster.
    """
    report.write_json(report.report(report.command_line(), device, settings, comparison.rows), path)
    console = Console()
    report.print_table(comparison.rows, COLUMNS, title, console)
    speedup = comparison.rows[-1]["speedup"]
    disturbed = [row["name"] for row in comparison.rows if is_disturbed(row)]
    if disturbed:
        console.print(
            f"Do not trust these times: calls of the {' and the '.join(disturbed)} UNet took more than {DISTURBED:g} "
            "times as long as the fastest of their kind on average, so something else is using this machine."
        )
    elif speedup is not None and speedup <= 1:
        console.print(why_slower)
    if comparison.advice is not None:
        console.print(comparison.advice)
    for file in [*comparison.files, path]:
        console.print(f"  {file}", highlight=False, markup=False, soft_wrap=True)
