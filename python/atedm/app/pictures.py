"""A picture of what pruning did: the kept tokens or the scores of each attention block at some denoising steps."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from atedm.files import whole_file
from atedm.policy.schedule import PRUNING, computed_steps
from atedm.unet.recording import Recording

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.gridspec import GridSpec
    from matplotlib.lines import Line2D
    from PIL.Image import Image

# Name in the UNet, resolution level, and whether it is pruned at all.
Block = tuple[str, int, bool]

_CELL = 168  # pixels of the longer side of a cell's image
_DROPPED = np.array([20, 22, 38], dtype=np.float64)
_LEVEL_TINTS = {2: (255, 214, 102), 3: (110, 231, 205)}
_OTHER_TINT = (190, 180, 255)
_INK, _FAINT = "#1f2233", "#8a8fa3"
# The colour scale of the scores spans a factor above and below their mean: the factor that this fraction of the scores
# stays within, limited to these bounds.
_SCORES_WITHIN, _SCORE_FACTORS = 0.98, (1.2, 10.0)
_TITLES = {
    "kept": "Which tokens each attention block computes",
    "scores": "How each attention block ranks its tokens",
}
_KEYS = {
    "kept": "bright: kept (yellow level 2, green level 3) · dark: dropped, filled in again",
    "scores": "bright: {factor:.2g} times the mean score and more · dark: 1/{factor:.2g} of it and less",
}


def steps_to_show(total: int, light: int, count: int = 9) -> list[int]:
    """Up to ``count`` of ``total`` steps, ascending. They include the first step, the last one, and the steps on both
    sides of the end of the light phase, which has ``light`` steps."""
    if total <= count:
        return list(range(total))
    boundaries = {0, total - 1, *({light - 1, light} if 0 < light < total else ())}
    evenly = {round(i * (total - 1) / (count - 1)) for i in range(count)}
    # Drop the step nearest to one that must be shown, because it adds least.
    while len(evenly | boundaries) > count:
        evenly.remove(min(evenly - boundaries, key=lambda step: (min(abs(step - b) for b in boundaries), step)))
    return sorted(evenly | boundaries)


def plot(
    recording: Recording,
    image: Image | None = None,
    *,
    what: str = "kept",
    row: int = -1,
    path: str | Path | None = None,
) -> Figure:
    """Draw every block (rows, in running order) at some steps (columns), and how often it kept each token.

    Args:
        recording: the recording of one whole run, see :func:`atedm.record`.
        image: the finished picture, drawn under the tokens; plain gray without one.
        what: ``"kept"`` shows kept tokens bright and dropped ones dark. ``"scores"`` shows the scores that tokens were
            chosen by, on a logarithmic scale around their mean that is as wide as the scores.
        row: row of the batch. With guidance the last row is the prompt's, the first the negative prompt's.
        path: also write the figure as a PNG to this file, whole or not at all.

    Returns:
        The figure; a notebook displays it.

    Raises:
        ValueError: ``what`` is neither of the two, the recording is empty, or its batch has no such ``row``.
    """
    _check(recording, what, row)
    masks, kinds, blocks = _masks(recording, row), _kinds(recording), recording.blocks
    # A reused step runs no attention block.
    computed = computed_steps(kinds)
    light = list(kinds.values()).count("light") if set(kinds.values()) <= PRUNING else None
    shown = [computed[n] for n in steps_to_show(len(computed), light or 0)]

    small = _background(recording) if image is None else _thumbnail(image)
    figure, grid, layout = _empty_figure(len(blocks), len(shown), small)
    scores = _scores(recording, row) if what == "scores" else {}
    factor = _score_factor(list(scores.values()))
    for i, block in enumerate(blocks):
        for j, step in enumerate(shown):
            axes = _bare(figure.add_subplot(grid[i, j]))
            mask = masks.get((block[0], step))
            if what == "scores" and mask is not None:
                _show_scores(axes, scores[block[0], step], small, factor)
            else:
                axes.imshow(_cell(small, mask, block[1]), interpolation="nearest")
            if mask is None:
                _frame(axes)
            if i == 0:
                kind = "" if light is not None else f" {kinds[step]}"
                axes.set_title(f"{step + 1}{kind}", fontsize=9, color=_INK, pad=3)
            if j == 0:
                _label(axes, block)
        axes = _bare(figure.add_subplot(grid[i, len(shown) + 1]))
        frequency = _frequency(masks, block[0], computed, small)
        axes.imshow(frequency, cmap="magma", vmin=0, vmax=1, interpolation="nearest")
        if i == 0:
            axes.set_title("all of them", fontsize=9, color=_INK, pad=3)
    columns_are = f"columns: {len(shown)} of {len(computed)} steps"
    if len(computed) < len(kinds):
        columns_are += f" that are computed ({len(kinds) - len(computed)} reuse features)"
    _write_around(figure, _TITLES[what], _KEYS[what].format(factor=factor), columns_are, layout)
    if light is not None:
        _write_phases(figure, shown, light, layout)
    if path is not None:
        with whole_file(Path(path)) as partial:
            figure.savefig(partial, format="png")
    return figure


def _empty_figure(rows: int, steps: int, small: np.ndarray) -> tuple[Figure, GridSpec, tuple[float, float, float]]:
    """A figure, a grid with one row per block, one column per step and a separate last column, and the layout in
    inches: width, height, and the height above the cells."""
    from matplotlib.figure import Figure

    top, bottom, left = 1.3, 0.55, 1.5
    height = top + bottom + 1.05 * small.shape[0] / small.shape[1] * rows
    width = left + 1.05 * (steps + 1) + 0.55
    figure = Figure(figsize=(width, height), dpi=150, facecolor="white")
    grid = figure.add_gridspec(
        rows,
        steps + 2,
        width_ratios=[1.0] * steps + [0.12, 1.0],
        left=left / width,
        right=1 - 0.15 / width,
        top=1 - top / height,
        bottom=bottom / height,
        wspace=0.06,
        hspace=0.06,
    )
    return figure, grid, (width, height, top)


def _check(recording: Recording, what: str, row: int) -> None:
    if what not in _TITLES:
        raise ValueError(f"what is {what!r}; expected one of {', '.join(map(repr, _TITLES))}")
    if not recording.calls:
        raise ValueError("recording is empty; expected a run of the pipeline inside its with block")
    rows = min((ranked.index.shape[0] for ranked in recording.ranked), default=1)
    if not -rows <= row < rows:
        raise ValueError(f"row is {row}; expected one of the batch's {rows}")


def _kinds(recording: Recording) -> dict[int, str]:
    """The kind of each step that was run. If a step has two UNet calls, the last one counts."""
    return {recording.step_of(call): kind for call, kind in enumerate(recording.kinds)}


def _masks(recording: Recording, row: int) -> dict[tuple[str, int], np.ndarray]:
    """bool ``[height, width]`` by block and step. If a step has two UNet calls, the last one counts."""
    return {(ranked.block, recording.step_of(ranked.call)): ranked.mask()[row].numpy() for ranked in recording.ranked}


def _scores(recording: Recording, row: int) -> dict[tuple[str, int], np.ndarray]:
    """float ``[height, width]`` by block and step: each score as a multiple of the mean score."""
    found = {}
    for ranked in recording.ranked:
        scores = ranked.scores[row].double().numpy().reshape(ranked.height, ranked.width)
        found[ranked.block, recording.step_of(ranked.call)] = scores / max(scores.mean(), np.finfo(float).tiny)
    return found


def _score_factor(scores: list[np.ndarray]) -> float:
    """The factor from the mean beyond which colours no longer distinguish ``scores``, which are multiples of it."""
    if not scores:
        return _SCORE_FACTORS[1]
    sizes = np.abs(np.log(np.concatenate([np.maximum(values, 1e-6).ravel() for values in scores])))
    return float(np.clip(np.exp(np.quantile(sizes, _SCORES_WITHIN)), *_SCORE_FACTORS))


def _thumbnail(image: Image) -> np.ndarray:
    scale = _CELL / max(image.size)
    size = [max(1, round(side * scale)) for side in image.size]
    return np.asarray(image.convert("RGB").resize(size), dtype=np.float64)


def _background(recording: Recording) -> np.ndarray:
    """A gray picture with the aspect ratio of the largest feature map."""
    sizes = [(ranked.height, ranked.width) for ranked in recording.ranked] or [(1, 1)]
    height, width = max(sizes)
    scale = _CELL / max(height, width)
    return np.full((max(1, round(height * scale)), max(1, round(width * scale)), 3), 128.0)


def _enlarged(field: np.ndarray, like: np.ndarray) -> np.ndarray:
    """``field [h, w]`` enlarged to the size of ``like [H, W, …]``; each value fills a rectangle."""
    rows, columns = (np.arange(n) * m // n for n, m in zip(like.shape, field.shape, strict=False))
    return field[np.ix_(rows, columns)]


def _cell(small: np.ndarray, mask: np.ndarray | None, level: int) -> np.ndarray:
    """The image, tinted by level, with dropped tokens almost black."""
    tint = np.array(_LEVEL_TINTS.get(level, _OTHER_TINT), dtype=np.float64)
    # Half tint, so that a dark picture does not make a kept token look dropped.
    bright = 0.5 * small + 0.5 * tint
    if mask is None:
        return bright.astype(np.uint8)
    dark = 0.1 * small + 0.9 * _DROPPED
    return np.where(_enlarged(mask, small)[..., None], bright, dark).astype(np.uint8)


def _show_scores(axes: Axes, scores: np.ndarray, small: np.ndarray, factor: float) -> None:
    logarithm = np.log(np.maximum(_enlarged(scores, small), 1e-6)) / np.log(factor)
    axes.imshow(logarithm, cmap="inferno", vmin=-1, vmax=1, interpolation="nearest")


def _frequency(masks: dict[tuple[str, int], np.ndarray], name: str, steps: list[int], small: np.ndarray) -> np.ndarray:
    """The fraction of ``steps`` in which each token was kept. A block that is left whole keeps all."""
    found = [masks[name, step] for step in steps if (name, step) in masks]
    if not found:
        return np.ones(small.shape[:2])
    return _enlarged((np.sum(found, axis=0) + len(steps) - len(found)) / len(steps), small)


def _bare(axes: Axes) -> Axes:
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(False)
    return axes


def _frame(axes: Axes) -> None:
    for spine in axes.spines.values():
        spine.set(visible=True, color="#d1495b", linewidth=1.6)


def _label(axes: Axes, block: Block) -> None:
    name, level, pruned = block
    short = name.replace("_blocks", "").replace("_block", "").replace(".attentions.", " · ").replace(".", " ")
    note = f"level {level}" + ("" if pruned else ", never pruned")
    axes.text(-0.08, 0.58, short, transform=axes.transAxes, ha="right", va="center", fontsize=9, color=_INK)
    axes.text(-0.08, 0.36, note, transform=axes.transAxes, ha="right", va="center", fontsize=7.5, color=_FAINT)


def _write_around(figure: Figure, title: str, key: str, columns: str, layout: tuple[float, float, float]) -> None:
    """Write the title, the meaning of the columns, and the key, placed in inches from the top left."""
    width, height, _ = layout

    def write(x: float, y: float, text: str, size: float, color: str, **style: object) -> None:
        figure.text(x / width, 1 - y / height, text, fontsize=size, color=color, va="center", **style)

    write(0.2, 0.28, title, 14, _INK, weight="bold")
    write(0.2, 0.54, f"{columns} · rows: blocks in the order in which they run", 8.5, _FAINT)
    for above_edge, text in (
        (0.36, key),
        (0.18, "red frame: block left whole · right: how often kept, black never, white always"),
    ):
        write(0.2, height - above_edge, text, 8, _FAINT)


def _write_phases(figure: Figure, shown: list[int], light: int, layout: tuple[float, float, float]) -> None:
    """Write DSAP's phases above the columns of the ``shown`` steps; the first ``light`` steps of the run are light."""
    _, height, top = layout
    before = sum(step < light for step in shown)
    phases = [(0, before - 1, "light phase: some blocks whole", "light")] if before else []
    if before < len(shown):
        phases.append((before, len(shown) - 1, "every block pruned" if before else "every step alike", "rest"))
    for start, end, text, short in phases:
        x0, x1 = _column_edges(figure, start)[0], _column_edges(figure, end)[1]
        y = 1 - (top - 0.3) / height
        figure.add_artist(_line([x0, x1], [y, y]))
        text = text if end - start > 0 else short
        figure.text((x0 + x1) / 2, y + 0.12 / height, text, fontsize=8.5, color=_INK, ha="center", va="center")


def _column_edges(figure: Figure, column: int) -> tuple[float, float]:
    """Left and right edge of a column of cells, as fractions of the figure's width. The first row's axes come first."""
    position = figure.axes[column].get_position()
    return position.x0, position.x1


def _line(x: list[float], y: list[float]) -> Line2D:
    from matplotlib.lines import Line2D

    return Line2D(x, y, color=_FAINT, linewidth=1.2)
