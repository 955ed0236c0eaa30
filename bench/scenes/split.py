"""Splits scenes into training and held-out ones. A tenth of all contents is held out and never seen in training."""

from __future__ import annotations

import zlib
from collections.abc import Iterator

import numpy as np

from atedm_bench.scenes.scene import Scene, sample_scene

_PARTS = 10


def held_out(scene: Scene) -> bool:
    """Whether ``scene``'s content (shapes, colours, their relations or place, background colour) is held out.

    This depends only on the content, so training never sees it in other wording or positions either.
    """
    things = [f"{item.color} {item.shape}" for item in scene.objects]
    if not scene.relations:
        things.sort()
    said = [relation.name for relation in scene.relations] or [scene.place or ""]
    return zlib.crc32("/".join([*things, *said, scene.background.color]).encode()) % _PARTS == 0


def scenes(rng: np.random.Generator, *, test: bool) -> Iterator[Scene]:
    """Yield endless scenes, either for training or (``test``) held out."""
    while True:
        scene = sample_scene(rng)
        if held_out(scene) == test:
            yield scene
