"""The one form of all figures that the package prints: a report object, its JSON file and its table."""

from __future__ import annotations

import datetime
import json
import math
import platform
import sys
from collections.abc import Collection, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from atedm.files import whole_file

PACKAGES = ("atedm-kernels", "torch", "triton", "diffusers", "transformers", "DeepCache", "tomesd")


def versions() -> dict[str, str | None]:
    """Installed version of each package that a figure may depend on; None if it is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def device_name(device: torch.device | str) -> str:
    """The maker's name of a device; for a CPU also the number of threads and the instruction set that torch uses."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "cpu":
        return f"{_cpu_model()}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"
    return device.type


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


_FILE_WIDTH = 160  # width of a table in a file, in characters


def report(command: str, device: torch.device | str, settings: dict[str, Any], rows: list[dict[str, Any]]) -> dict:
    """``{command, device, versions, date, settings, rows}``; ``rows`` are flat objects with a ``name``."""
    return {
        "command": command,
        "device": device_name(device),
        "versions": versions(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "settings": settings,
        "rows": rows,
    }


def write_json(document: dict, path: Path, *, keep_same: bool = False, ignored: Collection[str] = ()) -> None:
    """Write atomically, so that a reader never sees half a file. NaN and infinity are written as null.

    Args:
        keep_same: keep an existing file that differs only in command, date, device and versions, so that starting a
            finished run again changes nothing. ignored: values of the rows that may differ too.
    """
    text = strict_json(document, indent=1) + "\n"
    if keep_same and _is_same(path, text, ignored):
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


_WRITTEN = dict.fromkeys(("command", "date", "device", "versions"))


def _is_same(path: Path, text: str, ignored: Collection[str]) -> bool:
    def compared(document: dict[str, Any]) -> dict[str, Any]:
        return {**document, **_WRITTEN, "rows": [{**row, **dict.fromkeys(ignored)} for row in document["rows"]]}

    if not path.is_file():
        return False
    try:
        before, after = json.loads(path.read_text(encoding="utf-8")), json.loads(text)
        return compared(before) == compared(after)
    except (ValueError, TypeError, KeyError, RecursionError):  # not a report, so it is replaced
        return False


def strict_json(document: Any, **style: Any) -> str:
    """``document`` as JSON, with null for NaN and infinity, which JSON lacks. ``style``: of ``json.dumps``."""
    return json.dumps(_finite(document), allow_nan=False, **style)


def _finite(value: Any) -> Any:
    """``value`` with None for NaN and infinity."""
    if isinstance(value, Mapping):
        return {name: _finite(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def command_line(program: str = "atedm") -> str:
    """The command line as typed, for the report."""
    return " ".join([program, *sys.argv[1:]])


def cell(value: Any) -> str:
    """A value as tables show it."""
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value)


def print_table(
    rows: list[dict[str, Any]], columns: dict[str, str], title: str, console: Console | None = None
) -> None:
    """Print ``rows`` as a table. ``columns`` maps keys to headings; the key ``name`` is the name of a row.

    A file has no width, so it gets long lines.
    """
    console = console or Console()
    if not console.is_terminal:
        console = Console(file=console.file, width=_FILE_WIDTH)
    # File names may contain square brackets, which are rich's markup.
    table = Table(title=Text(title), title_justify="left")
    for key, heading in columns.items():
        table.add_column(heading, justify="left" if key == "name" else "right", overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell(row.get(key))) for key in columns))
    console.print(table)
