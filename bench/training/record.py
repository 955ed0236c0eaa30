"""Collects the training record for the model card: each stage's progress, device and loss curve."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from atedm.app.report import device_name, versions
from atedm_bench.training.loop import LOG, counter_of, loading, newest_checkpoint

_STAGES = {"vae-training": "autoencoder", "text-training": "text encoders", "unet-training": "UNet and text encoders"}
_POINTS = 60


def lineage(notes: Sequence[dict[str, Any]], last_step: int) -> list[dict[str, Any]]:
    """Return the notes up to ``last_step``. Steps that a resumed run repeated replace those of the interrupted run."""
    kept: list[dict[str, Any]] = []
    for note in reversed(notes):
        if note["step"] <= last_step and (not kept or note["step"] < kept[-1]["step"]):
            kept.append(note)
    return kept[::-1]


def _notes(log: Path) -> list[dict[str, Any]]:
    """Return the notes of a log, without lines that a killed run left unfinished."""
    notes = []
    for line in log.read_text(encoding="utf-8").splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            notes.append(json.loads(line))
    return notes


def _thinned(notes: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return means over stretches of the log, because single batches are noisy."""
    if not notes:
        return []
    size = -(-len(notes) // _POINTS)
    stretches = [notes[n : n + size] for n in range(0, len(notes), size)]
    measures = [name for name in notes[0] if name not in ("step", "images", "seconds", "lr", "norm")]
    return [
        {
            "images": stretch[-1]["images"],
            **{name: _mean([note[name] for note in stretch if note[name] is not None]) for name in measures},
        }
        for stretch in stretches
    ]


def _mean(values: list[float]) -> float | None:
    """Return the mean; None without values, where a loss was not finite."""
    return round(sum(values) / len(values), 5) if values else None


def _stage(folder: Path, run: int, checkpoint: Path) -> dict[str, Any]:
    counter = counter_of(checkpoint)
    return {
        "stage": _STAGES[folder.name],
        "run": run,
        "steps": counter.step,
        "images": counter.images,
        "minutes": round(counter.seconds / 60, 1),
        "curve": _thinned(lineage(_notes(folder / LOG), counter.step)),
    }


def record(folders: Sequence[Path]) -> dict[str, Any]:
    """Record the training in ``folders`` up to their newest checkpoints. Each started from the previous one's weights.

    Raises:
        OSError: a folder holds no log or no checkpoint, or a damaged one.
    """
    stages = []
    for n, folder in enumerate(folders):
        found = [name for name in _STAGES if (folder / name / LOG).is_file()]
        if not found:
            raise FileNotFoundError(f"{folder} holds no log of a training stage")
        for name in found:
            checkpoint = newest_checkpoint(folder / name)
            if checkpoint is None:
                raise FileNotFoundError(f"{folder / name} holds no checkpoint")
            with loading(folder / name):
                stages.append(_stage(folder / name, n + 1, checkpoint))
    # This is assumed to be the machine that trained, because the checkpoints are here.
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return {"device": device_name(device), "versions": versions(), "stages": stages}
