"""What the commands share: option checks and the progress bar."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from atedm.cli.checks import bad
from atedm.files import is_stream


class Benchmark(Protocol):
    """A measurement that can be interrupted. ``run`` calls ``notify`` with what comes next, ``work()`` times."""

    def work(self) -> int: ...

    def run(self, notify: Callable[[str], None]) -> None: ...


def check_minutes(minutes: float) -> float:
    if minutes <= 0:
        raise bad("minutes", f"{minutes}; expected a positive number")
    return minutes


def check_ratio(ratio: float) -> float:
    if not 0 < ratio < 1:
        raise bad("ratio", f"{ratio}; expected a number between 0 and 1")
    return ratio


def run(benchmark: Benchmark, save: Callable[[], None], path: Path) -> bool:
    """Run ``benchmark`` under a progress bar. Returns False if Ctrl-C ended the run.

    After each step it calls ``save``, which writes ``path``; not if ``path`` cannot be replaced, such as a pipe.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    saves = not is_stream(path)
    # On stderr, so that the tables can be piped. One refresh per second, because drawing the bar costs time.
    with Progress(*columns, console=Console(stderr=True), refresh_per_second=1, transient=True) as progress:
        task = progress.add_task("starting", total=benchmark.work())
        begun = False

        def notify(what: str) -> None:
            nonlocal begun
            if begun and saves:
                save()
            progress.update(task, advance=1 if begun else 0, description=what, refresh=True)
            begun = True

        try:
            benchmark.run(notify)
        except KeyboardInterrupt:
            return False
    return True
