"""The captions of the quality lab, and the figures of the pictures that are made from them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from atedm_bench.quality import metrics
from atedm_bench.quality.checker import Checker, detect, load_checker
from atedm_bench.quality.checker_training import held_out_renders
from atedm_bench.quality.images import SceneCase, load_pictures
from atedm_bench.quality.judge import Verdict, judge
from atedm_bench.scenes import caption
from atedm_bench.scenes.split import scenes

# Seed of the held-out captions.
_CAPTIONS = 21

# The captions of the endless list by name, each with the number of captions before its first. Choices were made on the
# chosen ones. Rules of :class:`atedm.Adaptive` for Karras' timesteps were made after looking at figures of the next 512
# captions. So that sampler is reported on the fresh ones, and all else on the held-out ones.
CAPTIONS = {"chosen": 0, "held-out": 64, "fresh": 576}
CHOSEN = CAPTIONS["held-out"]

# The Fréchet distance compares with held-out renders: this many per generated picture, within these bounds.
_REFERENCES_PER_PICTURE = 8
REFERENCES = (128, 2000)


def scene_cases(count: int, seed: int = 0, skip: int = 0) -> list[SceneCase]:
    """Return ``count`` captions after the first ``skip`` of an endless list, on which the model was never trained.

    Case n of the list has noise seed ``seed + n``.
    """
    rng = np.random.default_rng(_CAPTIONS)
    found = itertools.islice(scenes(rng, test=True), skip + count)
    return [SceneCase(caption(scene, rng), seed + n, scene) for n, scene in enumerate(found)][skip:]


@dataclass(frozen=True)
class Figures:
    """The figures of one setting.

    ``row``: flat, for the table. ``samples``: for some figures, one number per picture, or bootstrap draws (the
    Fréchet distance).
    """

    row: dict[str, Any]
    samples: dict[str, np.ndarray]


class SceneFigures:
    """Computes the figures of scene pictures: the checker's verdicts, and distances."""

    def __init__(self, cases: Sequence[SceneCase], size: int, checker: Checker | None = None) -> None:
        self.cases = cases
        self.checker = checker or load_checker()
        references = min(max(_REFERENCES_PER_PICTURE * len(cases), REFERENCES[0]), REFERENCES[1])
        self.distance = metrics.FeatureDistance(self.checker, held_out_renders(references, size)[1])

    def verdicts(self, pixels: Tensor) -> list[Verdict]:
        """Return one verdict per picture, in the order of the cases."""
        found = [seen for batch in pixels.split(metrics.BATCH) for seen in detect(self.checker, batch)]
        return [judge(case.scene, seen) for case, seen in zip(self.cases, found, strict=True)]

    def __call__(self, paths: Sequence[Path], full: Sequence[Path]) -> Figures:
        """Return the figures of one setting's pictures. ``full``: the full model's pictures from the same seeds."""
        pixels = load_pictures(paths)
        verdicts = self.verdicts(pixels)
        samples = {"accuracy": np.array([float(v.right) for v in verdicts])}
        low, high = metrics.share_interval(sum(v.right for v in verdicts), len(verdicts))
        distance, samples["frechet_distance"] = self.distance(pixels)
        row: dict[str, Any] = {
            "accuracy": float(samples["accuracy"].mean()),
            "accuracy_low": low,
            "accuracy_high": high,
            "objects": sum(v.objects for v in verdicts) / sum(v.asked for v in verdicts),
            "extra_objects": sum(v.extra for v in verdicts) / len(verdicts),
            **metrics.spread_of("frechet_distance", distance, samples["frechet_distance"]),
        }
        if paths is not full:
            pairs = list(zip(pixels.split(metrics.BATCH), load_pictures(full).split(metrics.BATCH), strict=True))
            compared = {
                "psnr_db": [metrics.psnr(a, b) for a, b in pairs],
                "ssim": [metrics.ssim(a, b) for a, b in pairs],
                "perceptual_distance": [metrics.perceptual_distance(self.checker, a, b) for a, b in pairs],
            }
            for name, found in compared.items():
                samples[name] = np.concatenate(found)
                row |= metrics.mean_of(name, samples[name])
        return Figures(row, samples)
