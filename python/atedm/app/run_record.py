"""The record that a run keeps in its folder of pictures: how they were made, and how long that took."""

from __future__ import annotations

import contextlib
import json
import statistics
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from atedm.app import report
from atedm.files import RUN, TIMES
from atedm.policy.schedule import KINDS

# Prompts, each with the seed of its starting noise.
Cases = Sequence[tuple[str, int]]


class OtherRun(ValueError):
    """The folder holds pictures of another run, or its record cannot be read."""


@contextlib.contextmanager
def naming_damage(path: Path) -> Iterator[None]:
    """Raise ``OtherRun``, which names ``path``, if reading its content fails because it is not what a run writes."""
    try:
        yield
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError) as error:
        raise OtherRun(f"{path} is damaged: {error}; expected the file that a run writes, or none") from None


def read_run(root: Path) -> dict[str, Any]:
    """Read the record of the pictures in the folder ``root``.

    Raises:
        OtherRun: the record is damaged. OSError: the folder has no record.
    """
    path = root / RUN
    with naming_damage(path):
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict) or not isinstance(found.get("settings"), dict):
            raise ValueError("it has no settings")
        if not isinstance(found.get("cases"), list):
            raise ValueError("it has no cases")
        if not str(found.get("model", "")).isprintable():
            raise ValueError("its model has no name that can be printed")
    return found


def claim(root: Path, model: str, described: Mapping[str, Any], cases: Cases, settings: Mapping[str, Any]) -> str:
    """Make ``root`` the folder of a run, or check that it already is, because pictures of two runs must not mix.

    A later start of the run may have more cases, or fewer, and more settings.

    Args:
        model: a name of the weights for the reader. Another name of the same content is the same run.
        described: what all pictures have in common. cases: prompts and seeds. settings: what only some pictures have,
            by name. All are values that JSON can hold.

    Returns:
        The name of the weights when the run began.

    Raises:
        OtherRun: ``root`` holds pictures made in another way; the message says what differs.
    """
    path = root / RUN
    described, asked, settings = (json.loads(json.dumps(values)) for values in (described, cases, settings))
    before: dict[str, Any] = {}
    if not path.is_file():
        stray = next(root.glob("*/" + "[0-9]" * 5 + ".png"), None)
        if stray is not None:
            raise OtherRun(
                f"{root} holds pictures ({stray.relative_to(root)}) but no {RUN}, which says how they were made; "
                "expected an empty folder or a run to resume"
            )
    else:
        before = read_run(root)
        shorter = min(len(before["cases"]), len(asked))
        differing = [name for name in described if before.get(name) != described[name]]
        if before["cases"][:shorter] != asked[:shorter]:
            differing.append("cases")
        differing += [name for name, value in settings.items() if before["settings"].get(name, value) != value]
        if differing:
            raise OtherRun(
                f"{root} holds pictures of another run ({', '.join(differing)} differ); "
                "expected an empty folder or the same run to resume"
            )
        settings = before["settings"] | settings
        asked = max(before["cases"], asked, key=len)
    record = {
        "model": before.get("model", model if model.isprintable() else ascii(model)),
        **described,
        "cases": asked,
        "settings": settings,
    }
    if record != before:
        report.write_json(record, path)
    return record["model"]


_MAX_STEPS = 10**9  # the largest number of steps, or of seconds, in a record


def _positive(value: Any) -> float:
    if not 0 < value <= _MAX_STEPS:
        raise ValueError(f"{value} is not a number that a run counts")
    return float(value)


def known_kind(name: str) -> str:
    if name not in KINDS:
        raise ValueError(f"{name!r} is not a kind of step")
    return name


@dataclass
class Times:
    """How long the pictures took, and which kinds of steps they ran.

    This is kept in the folder, so that a run that resumes, or is started again when it has finished, knows all times.

    Attributes:
        device: the device of this run; times of other devices are kept separately. kinds: number of steps of each kind.
        has_new: whether this run has added times.
    """

    root: Path
    device: str
    kinds: Counter[str] = field(default_factory=Counter)
    _seconds: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    has_new: bool = field(default=False, init=False)

    @classmethod
    def read(cls, root: Path, device: str) -> Times:
        """Read the times from the folder ``root``, if it has any.

        Raises:
            OtherRun: the file is damaged.
        """
        path = root / TIMES
        if not path.is_file():
            return cls(root, device)
        with naming_damage(path):
            found = json.loads(path.read_text(encoding="utf-8"))
            seconds = {
                place: {name: [*map(_positive, each)] for name, each in names.items()}
                for place, names in found["seconds"].items()
            }
            counts = {known_kind(kind): int(_positive(n)) for kind, n in found["kinds"].items()}
            return cls(root, device, Counter(counts), seconds)

    def note(self, name: str, seconds_per_picture: float, kinds: Iterable[str]) -> None:
        """Add one batch of the UNet called ``name``."""
        self._seconds.setdefault(self.device, {}).setdefault(name, []).append(seconds_per_picture)
        self.kinds.update(kinds)
        self.has_new = True

    def median(self, name: str) -> float | None:
        """Median seconds per picture of the UNet called ``name``, on this device; if it made none here, on others."""
        found = self._seconds.get(self.device, {}).get(name)
        found = found or [each for names in self._seconds.values() for each in names.get(name, [])]
        return statistics.median(found) if found else None

    def write(self) -> None:
        report.write_json({"seconds": self._seconds, "kinds": self.kinds}, self.root / TIMES)
