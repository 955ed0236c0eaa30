"""Times the UNet in every setting, in turn in one process. Making pictures is separate: processes may share that."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from atedm.app import report
from atedm.app.comparison import UNetTimer
from atedm.app.prompts import PromptCase, Sampling
from atedm.app.run_record import naming_damage
from atedm_bench.quality.images import run_without_decoding
from atedm_bench.quality.settings import Setting

# Each round times a whole run, because the steps of a run differ in kind.
PICTURES, ROUNDS = 4, 5


def unet_seconds(
    pipe: Any,
    settings: Sequence[Setting],
    cases: Sequence[PromptCase],
    sampling: Sampling,
    path: Path,
    rounds: int = ROUNDS,
    on_run: Callable[[str], None] = lambda name: None,
) -> dict[str, list[float]]:
    """Return the UNet seconds per picture of ``sampling.steps`` steps, by setting, in each of ``rounds``.

    A round runs every setting on the same prompts. Each round starts with a different setting.

    Args:
        path: file that stores every time, so that an interrupted run can resume. Times in it that were measured on
            another device, size or batch are ignored.
    """
    pictures = min(PICTURES, sampling.batch, len(cases))
    pipe.set_progress_bar_config(disable=True)

    def run(setting: Setting, count: int) -> float:
        with setting.method.in_force(pipe) as start_batch, UNetTimer(pipe.unet) as timer:
            start_batch(0)
            run_without_decoding(pipe, cases[:pictures], sampling, num_inference_steps=count)
        return sum(timer.seconds) / pictures

    described = {
        **{"device": report.device_name(pipe.device), "dtype": str(pipe.unet.dtype), "pictures": pictures},
        **dataclasses.asdict(sampling),
    }
    found = _kept_times(path, described)
    for n in range(rounds):
        start = n * len(settings) // rounds
        for setting in [*settings[start:], *settings[:start]]:
            on_run(setting.name)
            times = found.setdefault(setting.name, [])
            if len(times) > n:
                continue
            if n == 0:
                run(setting, min(2, sampling.steps))  # warms up
            times.append(run(setting, sampling.steps))
            report.write_json({**described, "seconds": found}, path)
    return {setting.name: found[setting.name][:rounds] for setting in settings}


def _kept_times(path: Path, described: dict[str, Any]) -> dict[str, list[float]]:
    if not path.is_file():
        return {}
    with naming_damage(path):
        kept = json.loads(path.read_text(encoding="utf-8"))
        if {**kept, "seconds": None} != {**described, "seconds": None}:
            return {}
        return {name: [*map(float, seconds)] for name, seconds in kept["seconds"].items()}
