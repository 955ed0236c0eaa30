"""Draws training batches. Every process and step has its own seed, so a resumed run sees the same data."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from atedm_bench.scenes import Scene, caption, render
from atedm_bench.scenes.split import scenes


def generator(*seed: int) -> np.random.Generator:
    """Return a generator for one batch. ``seed``: the recipe's seed, the stage, the step and the process."""
    return np.random.default_rng(seed)


def draw(rng: np.random.Generator, count: int) -> tuple[list[Scene], list[str]]:
    """Draw ``count`` training scenes and a caption for each."""
    source = scenes(rng, test=False)
    found = [next(source) for _ in range(count)]
    return found, [caption(scene, rng) for scene in found]


def as_tensor(painted: list[np.ndarray]) -> Tensor:
    """Stack pictures uint8 ``[H, W, 3]`` into one float32 ``[B, 3, H, W]`` in -1 … 1."""
    return torch.from_numpy(np.stack(painted)).permute(0, 3, 1, 2).float() / 127.5 - 1


def pictures(found: list[Scene], size: int) -> Tensor:
    """Render scenes as float32 ``[B, 3, size, size]`` in -1 … 1."""
    return as_tensor([render(scene, size)[0] for scene in found])


def tokenize(tokenizer: object, captions: list[str]) -> Tensor:
    """Tokenize captions to int64 ``[B, max_tokens]``, padded as in the pipeline."""
    found = tokenizer(
        captions,
        padding="max_length",
        max_length=tokenizer.model_max_length,
        truncation=True,
        return_tensors="pt",
    )
    return found.input_ids


class _Batches(Dataset):
    def __init__(self, make: Callable[[np.random.Generator, int], Any], seed: tuple[int, ...], process: int) -> None:
        self.make = make
        self.seed = seed
        self.process = process

    def __getitem__(self, step: int) -> Any:
        return self.make(generator(*self.seed, step, self.process), step)


def batches(
    make: Callable[[np.random.Generator, int], Any], seed: tuple[int, ...], process: int, first: int, workers: int
) -> Iterator[Any]:
    """Yield ``make(generator, step)`` in order from step ``first`` on, by ``workers`` processes (0: in this one)."""
    steps = range(first, 2**31)
    # Worker processes help with GPUs. When training runs on the CPU, they would only take its cores.
    return iter(DataLoader(_Batches(make, seed, process), batch_size=None, sampler=steps, num_workers=workers))
