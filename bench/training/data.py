"""Endless training batches: every process and every step has its own seed, so a resumed run sees new scenes."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from atedm.bench.scenes import Scene, caption, render
from atedm.bench.scenes.split import scenes


def generator(*seed: int) -> np.random.Generator:
    """A generator for one batch; ``seed``: the recipe's, the stage, the step, the process."""
    return np.random.default_rng(seed)


def draw(rng: np.random.Generator, count: int) -> tuple[list[Scene], list[str]]:
    """``count`` training scenes and a caption of each."""
    source = scenes(rng, test=False)
    found = [next(source) for _ in range(count)]
    return found, [caption(scene, rng) for scene in found]


def pictures(found: list[Scene], size: int) -> Tensor:
    """float32 ``[B, 3, size, size]`` in -1 … 1."""
    pixels = np.stack([render(scene, size)[0] for scene in found])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1


def tokenize(tokenizer: object, captions: list[str]) -> Tensor:
    """int64 ``[B, max_tokens]``, padded, as the pipeline does it."""
    found = tokenizer(
        captions,
        padding="max_length",
        max_length=tokenizer.model_max_length,
        truncation=True,
        return_tensors="pt",
    )
    return found.input_ids
