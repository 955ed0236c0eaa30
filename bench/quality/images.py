"""Makes a setting's pictures and knows where they are stored."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from atedm.app.comparison import open_image
from atedm.app.prompts import PromptCase, Sampling, make_pictures, picture_path
from atedm_bench.quality.settings import Setting, in_force
from atedm_bench.scenes import Scene


@dataclass(frozen=True)
class SceneCase(PromptCase):
    """A case with the scene that its prompt asks for."""

    scene: Scene


def folder_of(root: Path, setting: Setting) -> Path:
    """The folder of a setting's pictures."""
    plain = "".join(c if c.isalnum() else "-" for c in setting.name.replace("×", "x"))
    return root / "-".join(part for part in plain.split("-") if part)


def run_without_decoding(pipe: Any, cases: Sequence[PromptCase], sampling: Sampling, **more: Any) -> None:
    """Denoise ``cases`` in one batch, to be observed meanwhile; ``more``: other pipeline arguments."""
    arguments = {"num_inference_steps": sampling.steps, "output_type": "latent", **more}
    pipe(
        prompt=[case.prompt for case in cases],
        generator=[torch.Generator().manual_seed(case.seed) for case in cases],
        guidance_scale=sampling.guidance,
        width=sampling.width,
        height=sampling.height,
        **arguments,
    )


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
    """Make a setting's missing pictures, see :func:`atedm.app.prompts.make_pictures`.

    The random draws of tomesd and of random pruning depend on the batch.
    """
    with in_force(pipe, setting) as start_batch:
        make_pictures(
            pipe,
            cases,
            sampling,
            folder_of(root, setting),
            process=process,
            processes=processes,
            before_batch=start_batch,
            on_picture=on_picture,
        )


def picture_paths(root: Path, setting: Setting, chosen: Iterable[int]) -> list[Path]:
    """The files of a setting's pictures for the ``chosen`` cases."""
    return [picture_path(folder_of(root, setting), n) for n in chosen]


def load_pictures(paths: Sequence[Path]) -> Tensor:
    """uint8 ``[N, 3, H, W]``; all pictures have one size."""
    pixels = np.stack([np.asarray(open_image(path)) for path in paths])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()
