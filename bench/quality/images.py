"""Makes a setting's pictures, and finds their files and the kinds of the steps that they ran."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import atedm
from atedm.app.images import open_image
from atedm.app.prompts import PromptCase, Sampling, make_pictures, picture_path
from atedm.app.run_record import known_kind, naming_damage
from atedm.files import whole_file
from atedm_bench.quality.settings import Setting
from atedm_bench.scenes import Scene


@dataclass(frozen=True)
class SceneCase(PromptCase):
    """A prompt case with the scene that its prompt asks for."""

    scene: Scene


def run_without_decoding(pipe: Any, cases: Sequence[PromptCase], sampling: Sampling, **more: Any) -> None:
    """Denoise ``cases`` in one batch, for callers that watch the run. ``more``: other pipeline arguments."""
    arguments = {"num_inference_steps": sampling.steps, "output_type": "latent", **more}
    pipe(
        prompt=[case.prompt for case in cases],
        generator=[torch.Generator().manual_seed(case.seed) for case in cases],
        guidance_scale=sampling.guidance,
        width=sampling.width,
        height=sampling.height,
        **arguments,
    )


class _Noting:
    """Wraps a pipeline, and writes the kinds of a batch's steps beside its pictures.

    It writes them before :func:`make_pictures` writes the pictures, so no picture of an interrupted run lacks them.
    """

    def __init__(self, pipe: Any, folder: Path) -> None:
        self.pipe = pipe
        self.folder = folder
        self.start = 0  # the number of the batch's first picture

    def __getattr__(self, name: str) -> Any:
        return getattr(self.pipe, name)

    def __call__(self, **arguments: Any) -> Any:
        with atedm.record(self.pipe, tokens=False) as recording:
            made = self.pipe(**arguments)
        with whole_file(_kinds_path(self.folder, self.start)) as partial:
            partial.write_text(json.dumps(recording.kinds) + "\n", encoding="utf-8")
        return made


def _kinds_path(folder: Path, start: int) -> Path:
    """Return the file with the kinds of the batch that begins with picture ``start``."""
    return picture_path(folder, start).with_suffix(".kinds.json")


def read_kinds(root: Path, setting: Setting, count: int, batch: int) -> list[tuple[str, ...]]:
    """Read the kinds of the steps that each of ``count`` pictures ran, as :func:`make_setting` recorded them.

    The pictures of a batch run the same steps: a schedule that chooses as it runs looks at all of them.

    Raises:
        OSError: the file of a batch is missing. OtherRun: it is damaged; the message names it.
    """
    found = []
    for n in range(count):
        path = _kinds_path(root / setting.folder, n - n % batch)
        with naming_damage(path):
            kinds = tuple(map(known_kind, json.loads(path.read_text(encoding="utf-8"))))
            if not kinds:
                raise ValueError("it names no kind of step")
        found.append(kinds)
    return found


def make_setting(
    pipe: Any,
    setting: Setting,
    cases: Sequence[PromptCase],
    root: Path,
    sampling: Sampling,
    *,
    process: int = 0,
    processes: int = 1,
    on_picture: Callable[[int], None] = lambda count: None,
) -> None:
    """Make a setting's missing pictures; see :func:`atedm.app.prompts.make_pictures`.

    The random draws of tomesd and of random pruning depend on the batch.
    """
    folder = root / setting.folder
    with setting.method.in_force(pipe) as start_batch:
        if setting.method.records:
            pipe = _Noting(pipe, folder)

        def before_batch(start: int) -> None:
            start_batch(start)
            if setting.method.records:
                pipe.start = start

        make_pictures(
            pipe,
            cases,
            sampling,
            folder,
            process=process,
            processes=processes,
            before_batch=before_batch,
            on_picture=on_picture,
        )


def picture_paths(root: Path, setting: Setting, count: int) -> list[Path]:
    """Return the files of a setting's first ``count`` pictures."""
    return [picture_path(root / setting.folder, n) for n in range(count)]


def load_pictures(paths: Sequence[Path]) -> Tensor:
    """Load pictures, all of one size, as uint8 ``[N, 3, H, W]``."""
    pixels = np.stack([np.asarray(open_image(path)) for path in paths])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()
