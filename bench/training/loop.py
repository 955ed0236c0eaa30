"""Runs one training stage: steps, a progress bar, a log, checkpoints to resume from. accelerate does the rest."""

from __future__ import annotations

import contextlib
import pickle
import shutil
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from safetensors import SafetensorError

from atedm.app.report import strict_json
from atedm.files import raising_os_error

LOG = "log.jsonl"
_CHECKPOINT = "checkpoint"
# The file that is written last.
_DONE = "done"
_NOTE_SECONDS = 20.0


def newest_checkpoint(folder: Path) -> Path | None:
    """Return the newest complete checkpoint of the stage in ``folder``, if any."""
    for name in (_CHECKPOINT, _CHECKPOINT + "-before"):
        if folder.joinpath(name, _DONE).is_file():
            return folder / name
    return None


def counter_of(checkpoint: Path) -> Counter:
    """Return the progress of the stage that wrote ``checkpoint``."""
    counter = Counter()
    counter.load_state_dict(load_part(checkpoint, 0))
    return counter


def load_part(checkpoint: Path, n: int) -> dict[str, Any]:
    """Return what the ``n``-th object that was registered for checkpointing has saved.

    Raises:
        OSError: the file is missing or damaged; the message names it.
    """
    file = checkpoint / f"custom_checkpoint_{n}.pkl"
    with loading(file):
        return torch.load(file, map_location="cpu", weights_only=True)


@contextlib.contextmanager
def loading(path: Path) -> Iterator[None]:
    """Turn what reading a damaged file of a training raises into an OSError that names ``path``."""
    try:
        yield
    except (SafetensorError, RuntimeError, EOFError, ValueError, TypeError, KeyError, pickle.UnpicklingError) as error:
        reason = textwrap.shorten(str(error), 200)
        raise OSError(f"{path} cannot be loaded: {reason}; is it damaged, or of another recipe?") from error


class Counter:
    """A stage's progress, saved as the first part of every checkpoint."""

    def __init__(self) -> None:
        self.step = 0
        self.images = 0
        self.seconds = 0.0

    def state_dict(self) -> dict[str, Any]:
        return dict(vars(self))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        vars(self).update(state)


class Stage:
    """Trains up to a number of images, from the last checkpoint in ``folder`` if there is one.

    Args:
        folder: holds this stage's checkpoints and log.
        checkpoint_seconds: time between two checkpoints.
    """

    def __init__(self, accelerator: Accelerator, folder: Path, name: str, checkpoint_seconds: float = 300.0) -> None:
        self.accelerator = accelerator
        self.folder = folder
        self.name = name
        self.checkpoint_seconds = checkpoint_seconds
        self.counter = Counter()
        folder.mkdir(parents=True, exist_ok=True)
        accelerator.register_for_checkpointing(self.counter)

    def resume(self) -> None:
        """Load the last complete checkpoint, if any.

        Raises:
            OSError: it cannot be loaded, because it is damaged or of another recipe.
        """
        found = newest_checkpoint(self.folder)
        if found is not None:
            with loading(found):
                self.accelerator.load_state(str(found))

    def save(self) -> None:
        """Write a checkpoint. The previous one stays until the new one is complete."""
        new, old = self.folder / _CHECKPOINT, self.folder / (_CHECKPOINT + "-before")
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process and new.is_dir():
            # If the last save was interrupted, the one before it is the only complete checkpoint.
            is_complete = new.joinpath(_DONE).is_file()
            dropped = old if is_complete else new
            if dropped.is_dir():
                shutil.rmtree(dropped)
            if is_complete:
                new.rename(old)
        self.accelerator.wait_for_everyone()
        with raising_os_error(new):
            self.accelerator.save_state(str(new))
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            new.joinpath(_DONE).touch()

    def run(self, images: int, step: Callable[[Counter], tuple[int, dict[str, Any]]]) -> None:
        """Call ``step`` until ``images`` have been seen.

        ``step`` gets the counter and does one optimiser step. It returns the number of images seen by all processes,
        and figures for the log.
        """
        main, counter = self.accelerator.is_main_process, self.counter
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        saved = noted = time.perf_counter()
        # Tensors stay on their device until they are logged: reading one waits for the GPU.
        sums: dict[str, Any] = {}
        count = 0
        with Progress(*columns, disable=not main) as progress:
            task = progress.add_task(self.name, total=images, completed=counter.images, note="")
            while counter.images < images:
                started = time.perf_counter()
                seen, figures = step(counter)
                now = time.perf_counter()
                counter.step += 1
                counter.images += seen
                counter.seconds += now - started
                count += 1
                for key, value in figures.items():
                    sums[key] = sums.get(key, 0.0) + value
                progress.update(task, completed=counter.images)
                if main and (now - noted > _NOTE_SECONDS or counter.images >= images):
                    row = {"step": counter.step, "images": counter.images, "seconds": round(counter.seconds, 1)}
                    row |= {key: round(float(value) / count, 5) for key, value in sums.items()}
                    with self.folder.joinpath(LOG).open("a") as log:
                        log.write(strict_json(row) + "\n")
                    progress.update(task, note=" ".join(f"{k} {v}" for k, v in row.items() if k in sums))
                    noted, count = now, 0
                    sums.clear()
                if self._together(now - saved > self.checkpoint_seconds):
                    self.save()
                    saved = time.perf_counter()
        self.save()

    def _together(self, flag: bool) -> bool:
        """Return the main process's ``flag`` in all processes, because their clocks differ."""
        if self.accelerator.num_processes == 1:
            return flag
        return bool(broadcast_object_list([flag])[0])
