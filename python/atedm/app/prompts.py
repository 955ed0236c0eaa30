"""Make pictures of many prompts, one PNG each. An interrupted run resumes, and processes share the work."""

from __future__ import annotations

import contextlib
import dataclasses
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from PIL.Image import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

import atedm
from atedm.app import report
from atedm.app.comparison import UNetTimer, advice, tflops_of, token_counts
from atedm.app.fingerprint import fingerprint
from atedm.app.images import check_image, images_of, save_image, unclamped
from atedm.app.run_record import Cases, Times, claim
from atedm.policy.options import Options
from atedm.unet.errors import RankedNaN


@dataclass(frozen=True)
class PromptCase:
    """A prompt and the seed of its starting noise."""

    prompt: str
    seed: int


@dataclass(frozen=True)
class Sampling:
    """How pictures are made. ``width``, ``height``: in pixels. ``batch``: number of pictures at a time."""

    steps: int
    guidance: float
    width: int
    height: int
    batch: int
    negative_prompt: str | None = None


@dataclass(frozen=True)
class Failure:
    """A picture that could not be made: its number among the cases, and the reason."""

    number: int
    prompt: str
    message: str


def described_cases(cases: Sequence[PromptCase]) -> Cases:
    """The cases in the form of a run's record."""
    return [(case.prompt, case.seed) for case in cases]


def own_device(device: torch.device) -> torch.device:
    """``device``, or this process's own GPU if several processes share the work."""
    state = PartialState(cpu=device.type == "cpu")
    return state.device if state.num_processes > 1 else device


def read_prompts(path: Path) -> list[str]:
    """The lines of a text file that are not empty.

    A line ends at a line feed, or at a carriage return and a line feed. Other separators belong to the prompt.

    Raises:
        ValueError: the file holds no prompt, or is not text. OSError: the file cannot be read.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"prompts: {path} is not UTF-8 text: {error}") from None
    found = [line.strip() for line in text.split("\n") if line.strip()]
    if not found:
        raise ValueError(f"prompts: {path} holds no prompt; expected one per line")
    return found


def picture_path(folder: Path, n: int) -> Path:
    """The path of the picture of case ``n``, from 0."""
    return folder / f"{n:05d}.png"


def _is_made(path: Path) -> bool:
    """Whether the picture exists. Raises OSError if it is damaged, as an interrupted run leaves no damaged file."""
    if not path.exists():
        return False
    check_image(path)
    return True


def make_pictures(
    pipe: Any,
    cases: Sequence[PromptCase],
    sampling: Sampling,
    folder: Path,
    *,
    process: int = 0,
    processes: int = 1,
    before_batch: Callable[[int], None] = lambda seed: None,
    on_picture: Callable[[int], None] = lambda count: None,
    on_failure: Callable[[Failure], None] | None = None,
) -> None:
    """Make the pictures that ``folder`` lacks; this process makes every ``processes``-th batch.

    Batches are the same however often a run was interrupted and whatever the number of processes.

    Args:
        before_batch: called before each batch with a number that only this batch has, and again before the batch is
            repeated without the pictures that failed. on_picture: called with the number of additional pictures.
        on_failure: called for each picture whose scores or pixels are NaN; the others of its batch are made without it.
            If None, the error is raised.

    Raises:
        OSError: a picture cannot be written, or an existing one is damaged; the others stay.
        RankedNaN: the scores of a picture are NaN, and ``on_failure`` is None.
        FloatingPointError: the pixels of a picture are not finite, and ``on_failure`` is None.
        RuntimeError: scores are NaN, but it is unknown of which picture.
    """
    folder.mkdir(parents=True, exist_ok=True)
    batches = [range(start, min(start + sampling.batch, len(cases))) for start in range(0, len(cases), sampling.batch)]
    mine = batches[process::processes]
    missing = [batch for batch in mine if not all(_is_made(picture_path(folder, n)) for n in batch)]
    on_picture(sum(len(batch) for batch in mine) - sum(len(batch) for batch in missing))
    pipe.set_progress_bar_config(disable=True)
    for batch in missing:
        left, images = list(batch), {}
        while left and not images:
            before_batch(batch.start)
            try:
                images = dict(zip(left, _images(pipe, [cases[n] for n in left], sampling), strict=True))
            except RankedNaN as error:
                if on_failure is None:
                    raise
                for n in [left[place] for place in _places_of(error, len(left))]:
                    left.remove(n)
                    message = f"picture {n:05d}: {error.block} ranks NaN at {error.place}"
                    on_failure(Failure(n, cases[n].prompt, message))
        for n in [n for n, image in images.items() if image is None]:
            del images[n]
            message = f"picture {n:05d} has pixels that are not finite"
            if on_failure is None:
                raise FloatingPointError(
                    f"{message}; expected numbers: look at the dtype, and at the prompt {cases[n].prompt!r}"
                )
            on_failure(Failure(n, cases[n].prompt, message))
        for n, image in images.items():
            save_image(image, picture_path(folder, n))
        if images:
            on_picture(len(images))


def _images(pipe: Any, cases: Sequence[PromptCase], sampling: Sampling) -> list[Image | None]:
    """Make one batch; None for a picture whose pixels are not finite."""
    with unclamped(pipe):
        made = pipe(
            prompt=[case.prompt for case in cases],
            negative_prompt=sampling.negative_prompt and [sampling.negative_prompt] * len(cases),
            # Drawn on the CPU, with one seed per picture: the same noise on every device and in every batch.
            generator=[torch.Generator().manual_seed(case.seed) for case in cases],
            num_inference_steps=sampling.steps,
            guidance_scale=sampling.guidance,
            width=sampling.width,
            height=sampling.height,
            output_type="pt",
        )
    return images_of(pipe, made.images)


def _places_of(error: RankedNaN, pictures: int) -> list[int]:
    """The places in the batch of the pictures whose scores are NaN.

    The UNet's batch must hold every picture once, or twice with guidance.
    """
    if error.batch not in (pictures, 2 * pictures):
        raise RuntimeError(
            f"the UNet's batch has {error.batch} rows for {pictures} pictures, so it cannot be told which one fails; "
            "expected a row for each picture, or two"
        ) from error
    return sorted({row % pictures for row in error.rows})


@dataclass
class PromptRun:
    """Pictures of many prompts, pruned in ``root/pruned`` and, ``with_full``, by the full UNet in ``root/full``.

    Attributes:
        times: times of the pictures, including those of earlier starts of this run; only the main process's are stored.
        failed: pictures that could not be made, each with the name of its UNet. The main process, which reports them,
            gets those of all processes; the others get none.
    """

    pipe: Any
    model: str
    dtype: str
    cases: Sequence[PromptCase]
    sampling: Sampling
    options: Options
    root: Path
    with_full: bool = False
    times: Times | None = field(default=None, init=False)
    failed: list[tuple[str, Failure]] = field(default_factory=list, init=False)

    @property
    def names(self) -> list[str]:
        return ["full", "pruned"] if self.with_full else ["pruned"]

    def make(self) -> None:
        """Make the missing pictures, except those whose scores or pixels are NaN.

        Each process makes its part, and all wait for the last one.

        Raises:
            OtherRun: ``root`` holds pictures of another run. OSError: a picture cannot be written; the others stay.
        """
        state = PartialState()
        if state.is_main_process:
            described = {"weights": fingerprint(self.pipe), "dtype": self.dtype}
            described["sampling"] = dataclasses.asdict(self.sampling)
            settings = {"pruned": self.options.to_dict(), "full": None}
            self.model = claim(self.root, self.model, described, described_cases(self.cases), settings)
        state.wait_for_everyone()
        self.times = Times.read(self.root, report.device_name(self.pipe.device))
        columns = (
            TextColumn("{task.description:<8}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
        )
        console = Console(stderr=True, quiet=not state.is_main_process)
        with Progress(*columns, TimeRemainingColumn(), console=console, disable=not state.is_main_process) as progress:
            for name in self.names:
                task = progress.add_task(name, total=len(self.cases))
                self._make(name, lambda count, task=task: progress.advance(task, count * state.num_processes))
        state.wait_for_everyone()
        failed = sorted(gather_object(self.failed), key=lambda each: (each[0], each[1].number))
        self.failed = failed if state.is_main_process else []

    def _make(self, name: str, on_picture: Callable[[int], None]) -> None:
        state = PartialState()
        kinds: list[str] = []
        with contextlib.ExitStack() as stack:
            if name != "full":
                stack.enter_context(atedm.applied(self.pipe, self.options))
                kinds = stack.enter_context(atedm.record(self.pipe, tokens=False)).kinds
            timer = stack.enter_context(UNetTimer(self.pipe.unet))
            spoiled: list[Failure] = []  # pictures of the batch that were drawn but cannot be saved

            def begin(seed: int) -> None:
                # Also discards what a failed batch left, which is not part of the time of a picture.
                timer.seconds.clear()
                kinds.clear()
                spoiled.clear()

            def fail(failure: Failure) -> None:
                self.failed.append((name, failure))
                spoiled.append(failure)

            def note(count: int) -> None:
                if timer.seconds:
                    self.times.note(name, sum(timer.seconds) / (count + len(spoiled)), kinds)
                    if state.is_main_process:
                        self.times.write()  # now, so that the next start knows them, however this one ends
                on_picture(count)

            make_pictures(
                self.pipe,
                self.cases,
                self.sampling,
                self.root / name,
                process=state.process_index,
                processes=state.num_processes,
                before_batch=begin,
                on_picture=note,
                on_failure=fail,
            )

    def _kinds_run(self) -> Counter[str] | None:
        """How many steps of each kind were run; None if only a run can tell and no run has."""
        steps = self.sampling.steps
        if self.times.kinds or self.options.steps.planned(steps) is None:
            return self.times.kinds or None
        return Counter(self.options.kinds_of(steps))

    def write_report(self, device: torch.device, path: Path) -> None:
        """Print a table and write the JSON. UNet seconds are the median over the batches made on this device.

        The JSON has one more entry than other reports: ``failed``, the pictures that could not be made.
        """
        if not PartialState().is_main_process:
            return
        size = self.sampling.width, self.sampling.height
        kinds = self._kinds_run()
        tflops: dict[str, float | None] = {**tflops_of(self.pipe, *size, self.options, kinds or Counter(whole=1))}
        if kinds is None:
            tflops["pruned"] = None
        rows = [
            {
                "name": name,
                "images": len(self.cases) - sum(of == name for of, _ in self.failed),
                "folder": name,
                "unet_seconds_per_image": self.times.median(name),
                "tflops": tflops[name],
            }
            for name in self.names
        ]
        described = {"model": self.model, "dtype": self.dtype, **dataclasses.asdict(self.sampling)}
        described |= self.options.to_dict()
        failed = [{"name": name, **dataclasses.asdict(failure)} for name, failure in self.failed]
        document = report.report(report.command_line(), device, described, rows)
        # The median depends on the device, so a start that drew nothing keeps the one that is there.
        ignored = () if self.times.has_new else ("unet_seconds_per_image",)
        report.write_json({**document, "failed": failed}, path, keep_same=True, ignored=ignored)
        columns = {"name": "UNet", "images": "images", "unet_seconds_per_image": "UNet seconds per image"}
        hint = advice(self.options, token_counts(self.pipe, *size))
        if hint is not None:
            Console().print(hint)
        report.print_table(
            rows, {**columns, "tflops": "TFLOPs per call, 1 image"}, f"{self.model}: {len(self.cases)} prompts"
        )
