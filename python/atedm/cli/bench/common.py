"""What the benchmarks' commands share: options that are checked the same way, and the progress bar."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

from atedm.cli.checks import bad

if TYPE_CHECKING:
    import torch

DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
DEVICES = ("cpu", "cuda")


class Measured(Protocol):
    """A benchmark: ``run`` calls its argument ``work()`` times, with what comes next."""

    def work(self) -> int: ...

    def run(self, notify: Callable[[str], None]) -> None: ...


def dtype_of(name: str) -> torch.dtype:
    import torch

    if name not in DTYPES:
        raise bad("dtype", f"{name!r}; expected one of {', '.join(DTYPES)}")
    return getattr(torch, DTYPES[name])


def size_of(name: str) -> tuple[int, int]:
    """Width and height in pixels."""
    from atedm.models import image_size

    try:
        return image_size(name)
    except ValueError as error:
        raise bad("size", str(error)) from error


def minutes_of(minutes: float) -> float:
    if minutes <= 0:
        raise bad("minutes", f"{minutes}; expected a positive number")
    return minutes


def ratio_of(ratio: float) -> float:
    if not 0 < ratio < 1:
        raise bad("ratio", f"{ratio}; expected a number between 0 and 1")
    return ratio


def device_of(name: str | None) -> torch.device:
    import torch

    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in DEVICES:
        raise bad("device", f"{name!r}; expected cpu, cuda or cuda:0")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise bad("device", f"{name!r}; expected cpu: torch {torch.__version__} finds no GPU here")
    if device.type == "cuda" and device.index is not None and device.index >= torch.cuda.device_count():
        raise bad("device", f"{name!r}; expected an index under {torch.cuda.device_count()}, the number of GPUs here")
    return device


def run(measured: Measured, save: Callable[[], None]) -> bool:
    """Run under a progress bar, saving what is measured between the steps; False where Ctrl-C ended it."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    # On stderr, so that the tables can be piped. One refresh a second: the CPU is what is being measured.
    with Progress(*columns, console=Console(stderr=True), refresh_per_second=1, transient=True) as progress:
        task = progress.add_task("starting", total=measured.work())
        begun = False

        def notify(what: str) -> None:
            nonlocal begun
            if begun:
                save()
            progress.update(task, advance=1 if begun else 0, description=what, refresh=True)
            begun = True

        try:
            measured.run(notify)
        except KeyboardInterrupt:
            return False
    return True
