"""Draws the roofline: what each op reaches, and the most that this device can reach."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import numpy as np
from matplotlib import pyplot as plt

from atedm.files import whole_file
from atedm_bench.ops.shapes import HEAD_DIM

_MARKERS = {"ours": "o", "fused attention": "*", "plain": "x", "plain compiled": "+", "copy": "s"}


def plot_roofline(document: dict[str, Any], path: Path) -> None:
    """Draw the rows of the first dtype.

    Left: ops that multiply, FLOP/s against FLOPs per byte. Right: ops that move data, bytes per second over a copy's.
    """
    rows = [row for row in document["rows"] if "error" not in row]
    dtype = rows[0]["dtype"]
    rows = [row for row in rows if row["dtype"] == dtype]
    settings = document["settings"]
    ceilings = {what: settings[f"ceiling_{what}_{dtype}"] for what in ("flops", "exponentials", "bytes")}
    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 5))
    _draw_products(left, [row for row in rows if row["flops"]], ceilings)
    _draw_moves(right, [row for row in rows if not row["flops"]], ceilings["bytes"])
    figure.suptitle(f"{document['device']}, {dtype}", fontsize=10)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as partial:
        figure.savefig(partial, dpi=120, format="png")
    plt.close(figure)


def _draw_products(axis: plt.Axes, rows: list[dict[str, Any]], ceilings: dict[str, float]) -> None:
    if not rows:
        axis.set_axis_off()
        return
    intensity = [row["flops"] / row["bytes"] for row in rows]
    x = np.geomspace(min(intensity) / 4, max(intensity) * 4, 100)
    axis.plot(x, np.minimum(ceilings["flops"], x * ceilings["bytes"]), "k-", label="memory and matrix products")
    # An element of the map costs one exponential and two FLOPs per channel of the head.
    roof = 2 * HEAD_DIM * ceilings["exponentials"]
    axis.axhline(roof, color="k", linestyle="--", label=f"exponentials, head dim {HEAD_DIM}")
    colors = {name: f"C{n}" for n, name in enumerate(dict.fromkeys(row["name"] for row in rows))}
    for name, color in colors.items():
        axis.plot([], [], color=color, linewidth=4, label=name)
    for row in rows:
        marker = _MARKERS.get(row["variant"])
        if marker and row["backend"] != "reference":
            axis.plot(row["flops"] / row["bytes"], row["flops"] / row["seconds"], marker, color=colors[row["name"]])
    axis.set(xscale="log", yscale="log", xlabel="FLOPs per byte, minimum", ylabel="FLOP/s")
    axis.legend(fontsize=7)
    axis.set_title("dot: ours, star: fused attention, cross: plain, plus: plain compiled", fontsize=9)


def _draw_moves(axis: plt.Axes, rows: list[dict[str, Any]], ceiling: float) -> None:
    if not rows:
        axis.set_axis_off()
        return
    shapes = list(dict.fromkeys(row["shape"] for row in rows))
    names = list(dict.fromkeys(row["name"] for row in rows))
    variants = [v for v in _MARKERS if any(row["variant"] == v for row in rows)]
    for n, variant in enumerate(variants):
        for row in rows:
            if row["variant"] == variant and row["backend"] != "reference":
                place = names.index(row["name"]) + (n - len(variants) / 2) * 0.12
                shade = shapes.index(row["shape"]) / max(1, len(shapes) - 1)
                axis.plot(
                    place, row["bytes"] / row["seconds"] / ceiling, _MARKERS[variant], color=plt.cm.viridis(shade)
                )
    axis.axhline(1.0, color="k")
    axis.set_xticks(range(len(names)), [name.replace(", ", ",\n") for name in names], fontsize=7)
    axis.set_ylabel("bytes moved per second, relative to a large copy")
    axis.set_ylim(bottom=0)
    axis.set_title("dot: ours, cross: plain, plus: plain compiled, square: a copy of the same bytes", fontsize=9)
