"""Trains the checker on renders and reports its accuracy."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import torch
from rich.progress import track
from torch import Tensor
from torch.nn import functional as F

from atedm.app import report
from atedm_bench.quality.checker import SIZE, STRIDE, Checker, detect, prepare, save_checker
from atedm_bench.quality.judge import judge
from atedm_bench.scenes import COLORS, SHAPES, Scene, render
from atedm_bench.scenes.split import scenes

# Seeds of the training renders, and of the held-out ones on which the accuracy is measured.
_TRAINING, _TEST = 11, 12

# Sizes of the renders. The checker resizes them all to its own size.
_RENDERED = (64, 96, 128)


def held_out_renders(count: int, size: int) -> tuple[list[Scene], Tensor]:
    """Return ``count`` held-out scenes and their pictures, uint8 ``[count, 3, size, size]``."""
    found = list(itertools.islice(scenes(np.random.default_rng(_TEST), test=True), count))
    pixels = np.stack([render(scene, size)[0] for scene in found])
    return found, torch.from_numpy(pixels).permute(0, 3, 1, 2)


def _disturb(pictures: Tensor, rng: np.random.Generator) -> Tensor:
    """Add blur, noise and small colour shifts, so that the checker also reads imperfect pictures."""
    if rng.random() < 0.5:
        small = int(rng.integers(32, SIZE))
        pictures = F.interpolate(pictures, (small, small), mode="bilinear", antialias=True, align_corners=False)
        pictures = F.interpolate(pictures, (SIZE, SIZE), mode="bilinear", align_corners=False)
    noise = torch.from_numpy(rng.standard_normal(pictures.shape, np.float32))
    shift = torch.from_numpy(rng.standard_normal((len(pictures), 3, 1, 1), np.float32))
    return pictures + noise * 0.12 * rng.random() + 0.05 * shift


def _targets(found: list[Scene]) -> tuple[Tensor, Tensor, Tensor]:
    """Return the heat ``[B, n, n]``, and the shape and colour indices ``[B, n, n]``, -1 away from objects."""
    cells = SIZE // STRIDE
    centre = (np.arange(cells) + 0.5) / cells
    heat = np.zeros((len(found), cells, cells), np.float32)
    shapes, colors = (np.full(heat.shape, -1) for _ in range(2))
    for b, scene in enumerate(found):
        for item in scene.objects:
            square = (centre[None, :] - item.x) ** 2 + (centre[:, None] - item.y) ** 2
            bump = np.exp(-square * cells**2 / 2)
            heat[b] = np.maximum(heat[b], bump)
            shapes[b][bump > 0.3] = SHAPES.index(item.shape)
            colors[b][bump > 0.3] = list(COLORS).index(item.color)
    return torch.from_numpy(heat), torch.from_numpy(shapes), torch.from_numpy(colors)


def _loss(logits: Tensor, heat: Tensor, shapes: Tensor, colors: Tensor) -> Tensor:
    read_shapes, read_colors = logits[:, 1:].split((len(SHAPES), len(COLORS)), dim=1)
    centres = F.binary_cross_entropy_with_logits(logits[:, 0], heat, pos_weight=torch.tensor(4.0))
    kinds = [
        F.cross_entropy(read, wanted, ignore_index=-1)
        for read, wanted in ((read_shapes, shapes), (read_colors, colors))
    ]
    return 10 * centres + sum(kinds)


def train(steps: int, batch: int, learning_rate: float = 2e-3) -> Checker:
    """Train a checker from scratch, seeded."""
    torch.manual_seed(0)
    model = Checker().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps)
    rng = np.random.default_rng(_TRAINING)
    source = scenes(rng, test=False)
    for step in track(range(steps), "checker"):
        found = list(itertools.islice(source, batch))
        size = _RENDERED[step % len(_RENDERED)]
        pixels = torch.from_numpy(np.stack([render(scene, size)[0] for scene in found])).permute(0, 3, 1, 2)
        loss = _loss(model(_disturb(prepare(pixels), rng)), *_targets(found))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval().requires_grad_(False)


def accuracy(model: Checker, count: int, size: int) -> dict[str, float]:
    """Measure the accuracy on held-out renders: the fraction of scenes read fully right, and of single facts."""
    found, pixels = held_out_renders(count, size)
    verdicts = [
        judge(scene, seen)
        for start in range(0, count, 64)
        for scene, seen in zip(found[start : start + 64], detect(model, pixels[start : start + 64]), strict=True)
    ]
    asked, relations = sum(v.asked for v in verdicts), sum(v.relations_asked for v in verdicts)
    return {
        "scenes_right": sum(v.right for v in verdicts) / count,
        "scenes_right_without_extra": sum(v.right and not v.extra for v in verdicts) / count,
        "objects_right": sum(v.objects for v in verdicts) / asked,
        "relations_right": sum(v.relations for v in verdicts) / relations,
    }


def train_and_report(steps: int, batch: int, test: int, out: Path) -> None:
    """Train the checker, measure it on ``test`` held-out renders, and write weights and figures to ``out``."""
    save_checker(train(steps, batch), out)
    from atedm_bench.quality.checker import load_checker

    model = load_checker(out)
    rows = [
        {"name": f"renders of {size} pixels", "size": size, **accuracy(model, test, size)} for size in (64, 128, 256)
    ]
    settings = {"steps": steps, "batch": batch, "renders": test}
    report.write_json(
        report.report(report.command_line("atedm-bench"), "cpu", settings, rows), out.with_suffix(".json")
    )
    columns = {"name": "held-out", "scenes_right": "scenes", "scenes_right_without_extra": "nothing extra"}
    report.print_table(rows, {**columns, "objects_right": "objects", "relations_right": "relations"}, "checker")
