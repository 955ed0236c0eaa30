"""Draws the plots of a run: quality against FLOPs, contact sheets, and the power iteration's convergence."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.ticker import LogLocator, PercentFormatter
from PIL import Image, ImageDraw

from atedm.app.images import open_image, save_image
from atedm.app.prompts import PromptCase
from atedm.files import whole_file
from atedm_bench.quality import convergence
from atedm_bench.quality.claims import MEASURES
from atedm_bench.quality.images import picture_paths
from atedm_bench.quality.settings import Setting

# One colour per line of the plot; see `Method.line`.
_COLORS = {
    "full": "black",
    "reuse alone": "tab:green",
    "both": "tab:purple",
    "tokens alone": "tab:blue",
    "published": "tab:red",
    "DeepCache": "tab:orange",
    "tomesd": "tab:brown",
    "random": "tab:gray",
}
_NAMES = {
    "full": "full UNet",
    "reuse alone": "ours, steps reused",
    "both": "ours, steps reused and tokens pruned",
    "tokens alone": "ours, tokens pruned",
    "published": "AT-EDM as published",
    "tomesd": "ToMe (tomesd)",
    "random": "random tokens",
}
_LABELS = {
    "accuracy": "right pictures",
    "perceptual_distance": "perceptual distance to the full model's picture",
    "fid": "FID",
    "clip_score": "CLIP score",
}
_LOG, _SHARES = ("perceptual_distance",), ("accuracy",)
_TITLE = 22


def plot_trade_off(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Plot each measure against the FLOPs of the mean UNet call, with the names of the presets.

    A dot is a setting, with its interval. A method's line joins the settings that no cheaper one of that method beats.
    """
    measures = [measure for measure in _LABELS if any(measure in row for row in rows)]
    figure, axes = plt.subplots(1, len(measures), figsize=(6.4 * len(measures), 5), squeeze=False)
    shown = [row for row in rows if row["group"] != "ablation"]
    for axis, measure in zip(axes[0], measures, strict=True):
        of_measure = [row for row in shown if measure in row]
        for line, color in _COLORS.items():
            dots = sorted((row for row in of_measure if row["line"] == line), key=lambda row: row["flops_part"])
            if dots:
                _draw(axis, dots, measure, color, _NAMES.get(line, line))
        presets = sorted((row for row in of_measure if row["group"] == "presets"), key=lambda row: row["flops_part"])
        for n, row in enumerate(presets):
            # Put names above and below in turn, because presets may be close to each other.
            place, offset = (row["flops_part"], row[measure]), (5, 6 if n % 2 else -13)
            axis.annotate(row["name"], place, offset, textcoords="offset points", fontsize=10, fontweight="bold")
        if measure in _LOG and any(row[measure] > 0 for row in of_measure):
            axis.set_yscale("log")
            axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.yaxis.set_major_formatter("{x:g}")
            axis.yaxis.set_minor_formatter("")
        if measure in _SHARES:
            axis.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        axis.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        axis.margins(x=0.15)
        axis.set_xlabel("FLOPs of the mean UNet call, of the full UNet's")
        axis.set_title(_LABELS[measure], fontsize=11)
        axis.grid(alpha=0.3)
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=9)
    _save(figure, path)


def _draw(axis: Any, dots: Sequence[dict[str, Any]], measure: str, color: str, name: str) -> None:
    x, y = ([row[key] for row in dots] for key in ("flops_part", measure))
    errors = None
    if all(f"{measure}_low" in row for row in dots):
        errors = [[abs(row[measure] - row[f"{measure}_{end}"]) for row in dots] for end in ("low", "high")]
    axis.errorbar(x, y, errors, color=color, fmt="none", elinewidth=0.8, alpha=0.4)
    axis.plot(x, y, "o", color=color, label=name, markersize=5)
    if dots[0]["line"] == "full":
        axis.axhline(y[0], color=color, linewidth=0.8, linestyle=":")
    best = _front(list(zip(x, y, strict=True)), MEASURES[measure].more)
    axis.plot(*zip(*best, strict=True), color=color, linewidth=1.5)


def _front(points: Sequence[tuple[float, float]], more: bool) -> list[tuple[float, float]]:
    """Return the ``points`` (FLOPs, figure) that no cheaper point equals or beats, ordered by FLOPs."""
    best: list[tuple[float, float]] = []
    for x, y in sorted(points, key=lambda point: (point[0], -point[1] if more else point[1])):
        if not best or (y > best[-1][1] if more else y < best[-1][1]):
            best.append((x, y))
    return best


def plot_convergence(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Plot the overlap of the kept set after n iterations with the converged set, one line per block.

    The first two panels start from uniform scores (mean and worst case), the others from the scores of the previous
    ranking (mean), one panel per run.
    """
    by_run = {run: [row for row in rows if row["step"] is None and row["run"] == run] for run in convergence.RUNS}
    every, *_ = by_run.values()
    panels = [("jaccard_{}", convergence.ITERATIONS, every, "mean")]
    panels += [("jaccard_{}_min", convergence.ITERATIONS, every, "worst picture and step")]
    panels += [
        ("jaccard_warm_{}", convergence.WARM_ITERATIONS, blocks, f"mean, from the previous ranking ({run})")
        for run, blocks in by_run.items()
    ]
    figure, axes = plt.subplots(1, len(panels), figsize=(4 * len(panels), 3.6), sharey=True)
    for axis, (figure_of, iterations, blocks, title) in zip(axes, panels, strict=True):
        for row in blocks:
            dashed = row["tokens"] == max(r["tokens"] for r in blocks)
            axis.plot(
                iterations,
                [row[figure_of.format(n)] for n in iterations],
                marker=".",
                linestyle="--" if dashed else "-",
                label=row["name"],
            )
        axis.set_xlabel("iterations")
        axis.set_title(title, fontsize=9)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("Jaccard overlap with the converged kept set")
    axes[1].legend(fontsize=5)
    _save(figure, path)


def _save(figure: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.set_layout_engine("constrained")
    with whole_file(path) as partial:
        figure.savefig(partial, dpi=110, format="png")
    plt.close(figure)


def contact_sheet(
    settings: Sequence[Setting],
    parts: Mapping[str, float],
    cases: Sequence[PromptCase],
    root: Path,
    path: Path,
    side: int = 128,
) -> None:
    """Draw a sheet with one row per setting and one column per prompt, the prompts on top.

    Args:
        parts: the part of the full UNet's FLOPs, by setting. cases: the first cases of the run.
    """
    label = 170
    titles = ["\n".join(textwrap.wrap(case.prompt, _TITLE)) for case in cases]
    measure = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    top = 6 + max(int(measure.multiline_textbbox((0, 0), title, font_size=10)[3]) for title in titles)
    sheet = Image.new("RGB", (label + side * len(cases), top + side * len(settings)), "white")
    draw = ImageDraw.Draw(sheet)
    for column, title in enumerate(titles):
        draw.multiline_text((label + column * side + 2, 2), title, fill="black", font_size=10)
    for row, setting in enumerate(settings):
        # The font has no multiplication sign.
        lines = textwrap.wrap(setting.name.replace("×", "x"), _TITLE)
        name = "\n".join([*lines, f"{parts[setting.name]:.0%} of FLOPs"])
        draw.multiline_text((4, top + row * side + side // 2 - 20), name, fill="black", font_size=12)
        for column, picture in enumerate(picture_paths(root, setting, len(cases))):
            sheet.paste(open_image(picture).resize((side, side)), (label + column * side, top + row * side))
    path.parent.mkdir(parents=True, exist_ok=True)
    save_image(sheet, path)
