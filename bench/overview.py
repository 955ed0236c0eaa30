"""Draws the README's picture: what the embedded model draws, full and pruned, and which tokens it computed late.

The captions are the first of the held-out ones on which the quality lab measures.
"""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image

import atedm
from atedm.app.comparison import tflops_of
from atedm.embedded import embedded_pipeline
from atedm.files import whole_file
from atedm.unet.recording import Ranked, Recording
from atedm_bench.quality.images import SceneCase
from atedm_bench.quality.lab import scene_cases

STEPS, GUIDANCE = 25, 5.0
# The blocks whose tokens are shown, at the last pruned step: the second to last of each level.
BLOCKS = ("up_blocks.1.attentions.1", "up_blocks.0.attentions.1")
_SKIP = 64
# How much of a dropped token stays visible, and the colour to which it fades, which no scene uses.
_LEFT, _DROPPED = 0.15, (0.36, 0.33, 0.55)


def draw(pipe: Any, cases: list[SceneCase]) -> np.ndarray:
    """Return the pictures ``[N, H, W, 3]`` of ``cases``, with values from 0 to 1."""
    return pipe(
        prompt=[case.prompt for case in cases],
        generator=[torch.Generator().manual_seed(case.seed) for case in cases],
        num_inference_steps=STEPS,
        guidance_scale=GUIDANCE,
        output_type="np",
    ).images


def kept_only(pictures: np.ndarray, recording: Recording, block: str) -> np.ndarray:
    """Return ``pictures``, with the tokens faded that ``block`` dropped at the last pruned step."""
    last: Ranked = [ranked for ranked in recording.ranked if ranked.block == block][-1]
    masks = last.mask()[-len(pictures) :].numpy()  # with guidance, the second half belongs to the prompts
    masks = np.stack([np.asarray(Image.fromarray(mask).resize(pictures.shape[2:0:-1], 0)) for mask in masks])
    return np.where(masks[..., None], pictures, _LEFT * pictures + (1 - _LEFT) * np.array(_DROPPED))


def overview(cases: list[SceneCase], rows: list[tuple[str, np.ndarray]]) -> Figure:
    """Draw one row of pictures for each of ``rows``, with its name on the left, and the captions on top."""
    left, top, side = 1.35, 0.75, 1.2
    width, height = left + side * len(cases), top + side * len(rows)
    figure = Figure(figsize=(width, height), dpi=100, facecolor="white")
    for i, (name, pictures) in enumerate(rows):
        figure.text(0.08 / width, 1 - (top + side * (i + 0.5)) / height, name, fontsize=9, va="center")
        for j, picture in enumerate(pictures):
            x, y = left + side * j, height - top - side * (i + 1)
            axes = figure.add_axes([x / width, y / height, 0.97 * side / width, 0.97 * side / height])
            axes.imshow(picture, interpolation="nearest")
            axes.set_axis_off()
    for j, case in enumerate(cases):
        text = "\n".join(textwrap.wrap(case.prompt, 22))
        figure.text((left + side * j) / width, 1 - (top - 0.08) / height, text, fontsize=6.5, va="bottom")
    return figure


def write_overview(output: Path, images: int) -> None:
    """Draw the pictures of ``images`` captions and write the PNG ``output``."""
    cases = scene_cases(_SKIP + images)[_SKIP:]
    pipe = embedded_pipeline()
    full = draw(pipe, cases)
    with atedm.applied(pipe), atedm.record(pipe) as recording:
        pruned = draw(pipe, cases)
    sides = full.shape[2:0:-1]
    tflops = tflops_of(pipe, *sides, atedm.Options(), recording.kinds)
    rows = [("full", full), (f"atedm.apply(pipe):\n{tflops['pruned'] / tflops['full']:.0%} of the FLOPs", pruned)]
    for block, level in zip(BLOCKS, (2, 3), strict=True):
        rows.append(
            (f"what a block of\nlevel {level} computed,\nlast pruned step", kept_only(pruned, recording, block))
        )
    output.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(output) as partial:
        overview(cases, rows).savefig(partial, format="png")
