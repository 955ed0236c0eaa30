"""The schedules by name, and a schedule as the option that :func:`atedm.apply` takes and as JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any

from atedm.policy.adaptive import Adaptive
from atedm.policy.schedule import DSAP, Every, Listed, Schedule

SCHEDULES: dict[str, type[Schedule]] = {"DSAP": DSAP, "Every": Every, "Adaptive": Adaptive}


def as_schedule(value: object) -> Schedule | None:
    """Convert what :func:`atedm.apply` takes: a schedule, None to prune at every step, or a list of kinds.

    Raises:
        TypeError, ValueError: ``value`` is something else.
    """
    if isinstance(value, (list, tuple)):
        return Listed(tuple(value))
    if value is None or isinstance(value, Schedule):
        return value
    raise TypeError(
        f"schedule is {value!r}; expected an atedm.DSAP, atedm.Every or atedm.Adaptive, a list of kinds, or None to "
        "prune at every step"
    )


def schedule_to_json(schedule: Schedule | None) -> Any:
    """A schedule as JSON: None, a list of kinds, or a mapping with the schedule's name and arguments.

    Raises:
        TypeError: a user-defined schedule, which cannot be written as JSON.
    """
    if schedule is None or isinstance(schedule, Listed):
        return None if schedule is None else list(schedule.steps)
    if type(schedule) not in SCHEDULES.values():
        raise TypeError(f"schedule is {schedule!r}; expected one of {', '.join(SCHEDULES)} or a list to write as JSON")
    return {"name": type(schedule).__name__, **asdict(schedule)}


def schedule_from_json(value: Any) -> Any:
    """Read what :func:`schedule_to_json` wrote. A mapping without a name is read as a :class:`DSAP`."""
    if not isinstance(value, Mapping):
        return value
    arguments = dict(value)
    name = arguments.pop("name", "DSAP")
    if name not in tuple(SCHEDULES):  # compared by equality, because a list cannot be hashed
        raise ValueError(f"schedule is named {name!r}; expected one of {', '.join(SCHEDULES)}")
    known = [f.name for f in fields(SCHEDULES[name])]
    if not set(arguments) <= set(known):
        raise ValueError(f"schedule is {value!r}; expected {', '.join(known)} of {name}")
    return SCHEDULES[name](**arguments)
