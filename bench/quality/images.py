"""Making a setting's pictures: one PNG each, so that an interrupted run goes on where it stopped."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from atedm.bench.quality.settings import Setting, in_force
from atedm.bench.scenes import Scene
from atedm.comparison import save_image


@dataclass(frozen=True)
class Case:
    """A prompt and its seed; ``scene`` where it is known what was asked."""

    prompt: str
    seed: int
    scene: Scene | None = None


@dataclass(frozen=True)
class Sampling:
    """How pictures are made. ``size``: pixels (width, height); ``batch``: pictures at a time."""

    steps: int
    guidance: float
    width: int
    height: int
    batch: int


def folder_of(root: Path, setting: Setting) -> Path:
    """Where a setting's pictures lie."""
    plain = "".join(c if c.isalnum() else "-" for c in setting.name.replace("×", "x"))
    return root / "-".join(part for part in plain.split("-") if part)


def picture_path(folder: Path, n: int) -> Path:
    return folder / f"{n:05d}.png"


def make_pictures(
    pipe: Any,
    setting: Setting,
    cases: Sequence[Case],
    root: Path,
    sampling: Sampling,
    *,
    process: int = 0,
    processes: int = 1,
    on_picture: Callable[[int], None] = lambda count: None,
) -> None:
    """Make the pictures that are missing; this process makes every ``processes``-th batch.

    Batches are the same however often a run was interrupted and whatever the number of processes: what tomesd and
    random pruning draw depends on the batch.
    """
    folder = folder_of(root, setting)
    folder.mkdir(parents=True, exist_ok=True)
    batches = [range(start, min(start + sampling.batch, len(cases))) for start in range(0, len(cases), sampling.batch)]
    mine = batches[process::processes]
    missing = [batch for batch in mine if not all(picture_path(folder, n).is_file() for n in batch)]
    on_picture(sum(len(batch) for batch in mine) - sum(len(batch) for batch in missing))
    if not missing:
        return
    pipe.set_progress_bar_config(disable=True)
    with in_force(pipe, setting) as start_batch:
        for batch in missing:
            start_batch(batch.start)
            made = pipe(
                prompt=[cases[n].prompt for n in batch],
                # Drawn on the CPU, one seed a picture: the same noise on every device and in every batch.
                generator=[torch.Generator().manual_seed(cases[n].seed) for n in batch],
                num_inference_steps=sampling.steps,
                guidance_scale=sampling.guidance,
                width=sampling.width,
                height=sampling.height,
            ).images
            for n, image in zip(batch, made, strict=True):
                save_image(image, picture_path(folder, n))
            on_picture(len(batch))


def picture_paths(root: Path, setting: Setting, count: int) -> list[Path]:
    """The first ``count`` pictures of a setting."""
    return [picture_path(folder_of(root, setting), n) for n in range(count)]


def load_pictures(paths: Sequence[Path]) -> Tensor:
    """uint8 ``[N, 3, H, W]``; all of one size."""
    pixels = np.stack([np.asarray(Image.open(path).convert("RGB")) for path in paths])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()
