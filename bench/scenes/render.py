"""Renders scenes by signed distances, so that edges are smooth at any size."""

from __future__ import annotations

import functools
import math

import numpy as np

from atedm_bench.scenes.scene import BACKGROUND_COLORS, COLORS, Background, Object, Scene

# Width of a ring and of a cross's arms, and a star's inner radius, as fractions of the radius.
_RING_WIDTH = 0.42
_ARM = 0.34
_STAR_INNER = 0.45


def _polygon(corners: int, inner: float | None = None) -> tuple[tuple[float, float], ...]:
    """Return corners on the unit circle, the first on top; with ``inner``, of a star with that inner radius."""
    count = corners if inner is None else 2 * corners
    radii = [1.0 if inner is None or n % 2 == 0 else inner for n in range(count)]
    return tuple(
        (r * math.sin(2 * math.pi * n / count), -r * math.cos(2 * math.pi * n / count)) for n, r in enumerate(radii)
    )


def _cross() -> tuple[tuple[float, float], ...]:
    a, b = _ARM, math.sqrt(1 - _ARM**2)
    quarter = [(-a, -b), (a, -b), (a, -a)]
    corners = []
    for turn in range(4):
        cos, sin = ((1, 0), (0, 1), (-1, 0), (0, -1))[turn]
        corners += [(x * cos - y * sin, x * sin + y * cos) for x, y in quarter]
    return tuple(corners)


_POLYGONS = {
    "square": tuple((x * math.sqrt(0.5), y * math.sqrt(0.5)) for x, y in ((-1, -1), (1, -1), (1, 1), (-1, 1))),
    "triangle": _polygon(3),
    "star": _polygon(5, _STAR_INNER),
    "cross": _cross(),
}


def _polygon_distance(x: np.ndarray, y: np.ndarray, corners: tuple[tuple[float, float], ...]) -> np.ndarray:
    """Return the signed distance to a polygon's nearest edge, negative inside by the even-odd rule."""
    nearest = np.full(x.shape, np.inf, np.float32)
    inside = np.zeros(x.shape, bool)
    for (ax, ay), (bx, by) in zip(corners, (*corners[1:], corners[0]), strict=True):
        ex, ey = bx - ax, by - ay
        px, py = x - ax, y - ay
        along = np.clip((px * ex + py * ey) / (ex * ex + ey * ey), 0, 1)
        nearest = np.minimum(nearest, (px - ex * along) ** 2 + (py - ey * along) ** 2)
        if ay != by:
            inside ^= ((ay > y) != (by > y)) & (px < ex * py / ey)
    return np.where(inside, -1, 1) * np.sqrt(nearest)


def _distance(item: Object, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Return the signed distance of points to ``item``, in units of its radius."""
    cos, sin = math.cos(item.angle), math.sin(item.angle)
    dx, dy = (x - item.x) / item.radius, (y - item.y) / item.radius
    dx, dy = dx * cos + dy * sin, dy * cos - dx * sin
    if item.shape == "circle":
        return np.hypot(dx, dy) - 1
    if item.shape == "ring":
        return np.abs(np.hypot(dx, dy) - (1 - _RING_WIDTH / 2)) - _RING_WIDTH / 2
    return _polygon_distance(dx, dy, _POLYGONS[item.shape])


@functools.lru_cache(maxsize=8)
def _grid(size: int) -> tuple[np.ndarray, np.ndarray]:
    centres = (np.arange(size, dtype=np.float32) + 0.5) / size
    return tuple(np.meshgrid(centres, centres))


def _background(background: Background, size: int) -> np.ndarray:
    """Paint a background ``[size, size, 3]`` in 0 … 1: the colour, and a darker or lighter tone for the texture."""
    x, y = _grid(size)
    color = np.array(BACKGROUND_COLORS[background.color], np.float32) / 255
    tone = color * 0.72 if color.mean() > 0.35 else color + 0.2
    phase, period = background.phase, background.period
    # Smooth steps one pixel wide, like the shapes' edges.
    slope = size * period / (2 * math.pi)

    def wave(t: np.ndarray) -> np.ndarray:
        return np.sin(2 * math.pi * (t / period + phase))

    if background.texture == "plain":
        mix = np.zeros((size, size), np.float32)
    elif background.texture == "gradient":
        turn = 2 * math.pi * phase
        mix = 0.5 + 0.7 * ((x - 0.5) * math.cos(turn) + (y - 0.5) * math.sin(turn))
    elif background.texture == "striped":
        mix = 0.5 + slope * wave(x if phase < 0.33 else y if phase < 0.67 else (x + y) / math.sqrt(2))
    elif background.texture == "checkered":
        mix = 0.5 + slope * wave(x) * wave(y)
    elif background.texture == "dotted":
        cell = np.hypot((x / period + phase) % 1 - 0.5, (y / period + phase) % 1 - 0.5)
        mix = 0.5 + (0.27 - cell) * size * period
    else:  # speckled: coarse noise, the same at every size
        cells = np.random.default_rng(background.seed).random((48, 48), np.float32)
        index = np.minimum((np.arange(size) + 0.5) / size * 48, 47).astype(int)
        mix = cells[np.ix_(index, index)]
    mix = np.clip(mix, 0, 1)[..., None]
    return color * (1 - mix) + tone * mix


def render(scene: Scene, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Paint ``scene`` as a square picture.

    Returns:
        ``picture`` uint8 ``[size, size, 3]``, and ``owner`` int64 ``[size, size]``: the object that covers a pixel's
        centre, -1 for the background. A ring's hole belongs to the background.
    """
    x, y = _grid(size)
    picture = _background(scene.background, size)
    owner = np.full((size, size), -1, np.int64)
    for n, item in enumerate(scene.objects):
        pixels = _distance(item, x, y) * item.radius * size
        cover = np.clip(0.5 - pixels, 0, 1)[..., None]
        color = np.array(COLORS[item.color], np.float32) / 255
        picture = picture * (1 - cover) + color * cover
        owner[pixels < 0] = n
    return np.round(picture * 255).astype(np.uint8), owner
