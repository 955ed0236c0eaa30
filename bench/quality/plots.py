"""Plots of a run: quality against FLOPs, contact sheets, and the power iteration's convergence."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot as plt
from PIL import Image, ImageDraw

from atedm.app.comparison import open_image, save_image
from atedm.app.prompts import PromptCase, picture_path
from atedm.files import whole_file
from atedm_bench.quality.convergence import ITERATIONS
from atedm_bench.quality.images import folder_of
from atedm_bench.quality.settings import Setting

_COLORS = {"ours": "tab:blue", "keys": "tab:green", "tomesd": "tab:orange", "random": "tab:gray", "full": "black"}
_NAMES = {"ours": "ours (AT-EDM)", "keys": "ours, by keys", "tomesd": "ToMe (tomesd)"}
_LABELS = {
    "accuracy": "prompt accuracy",
    "frechet_distance": "Fréchet distance (checker's features)",
    "perceptual_distance": "perceptual distance to the full model",
    "psnr_db": "PSNR to the full model, dB",
    "fid": "FID",
    "clip_score": "CLIP score",
}
_TITLE = 22


def plot_trade_off(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Each measure against the FLOPs of the mean UNet call: one line per method, bars if intervals are known."""
    measures = [m for m in _LABELS if any(m in row for row in rows)][:4]
    figure, axes = plt.subplots(1, len(measures), figsize=(4.2 * len(measures), 3.6), squeeze=False)
    shown = [row for row in rows if row["group"] == "budget"]
    for axis, measure in zip(axes[0], measures, strict=True):
        for kind, color in _COLORS.items():
            line = sorted((r for r in shown if r["kind"] == kind and measure in r), key=lambda r: r["flops_part"])
            if not line:
                continue
            x, y = ([row[key] for row in line] for key in ("flops_part", measure))
            errors = None
            if all(f"{measure}_low" in row for row in line):
                errors = [
                    [r[measure] - r[f"{measure}_low"] for r in line],
                    [r[f"{measure}_high"] - r[measure] for r in line],
                ]
            axis.errorbar(x, y, errors, marker="o", capsize=3, color=color, label=_NAMES.get(kind, kind), linewidth=1.5)
            if kind == "full":
                axis.axhline(y[0], color=color, linewidth=0.8, linestyle=":")
        axis.set_xlabel("FLOPs per UNet call, relative to the full UNet")
        axis.set_title(_LABELS[measure], fontsize=10)
        axis.grid(alpha=0.3)
    axes[0][0].legend()
    _save(figure, path)


def plot_convergence(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Overlap of the kept set after n iterations with the converged set: mean and worst, one line per block."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True)
    blocks = [row for row in rows if row["step"] is None]
    for axis, suffix, title in ((axes[0], "", "mean"), (axes[1], "_min", "worst picture and step")):
        for row in blocks:
            dashed = row["tokens"] == max(r["tokens"] for r in blocks)
            axis.plot(
                ITERATIONS,
                [row[f"jaccard_{n}{suffix}"] for n in ITERATIONS],
                marker=".",
                linestyle="--" if dashed else "-",
                label=row["name"],
            )
        axis.set_xlabel("iterations")
        axis.set_title(f"Jaccard overlap with the converged kept set: {title}", fontsize=9)
        axis.grid(alpha=0.3)
    axes[1].legend(fontsize=5)
    _save(figure, path)


def _save(figure: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.tight_layout()
    with whole_file(path) as partial:
        figure.savefig(partial, dpi=110, format="png")
    plt.close(figure)


def contact_sheet(
    settings: Sequence[Setting],
    cases: Sequence[PromptCase],
    chosen: Sequence[int],
    root: Path,
    path: Path,
    side: int = 128,
) -> None:
    """One row per setting, one column per prompt; the prompts stand on top."""
    label = 150
    top = 78
    sheet = Image.new("RGB", (label + side * len(chosen), top + side * len(settings)), "white")
    draw = ImageDraw.Draw(sheet)
    for column, n in enumerate(chosen):
        lines = "\n".join(textwrap.wrap(cases[n].prompt, _TITLE))
        draw.multiline_text((label + column * side + 2, 2), lines, fill="black", font_size=10)
    for row, setting in enumerate(settings):
        part = f"{setting.flops / settings[0].flops:.0%} of FLOPs"
        draw.multiline_text(
            (4, top + row * side + side // 2 - 14), f"{setting.name}\n{part}", fill="black", font_size=12
        )
        for column, n in enumerate(chosen):
            picture = open_image(picture_path(folder_of(root, setting), n))
            sheet.paste(picture.resize((side, side)), (label + column * side, top + row * side))
    path.parent.mkdir(parents=True, exist_ok=True)
    save_image(sheet, path)
