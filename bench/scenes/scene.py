"""Defines scenes and draws them at random. Lengths are fractions of the picture's side; y points down."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

T = TypeVar("T")

# RGB, 8 bits. Different enough to be distinguished after a diffusion model has drawn them.
COLORS: dict[str, tuple[int, int, int]] = {
    "red": (216, 30, 36),
    "orange": (246, 132, 20),
    "yellow": (248, 216, 32),
    "green": (36, 150, 56),
    "blue": (36, 72, 214),
    "purple": (128, 42, 170),
    "pink": (250, 148, 190),
    "white": (248, 248, 248),
    "black": (18, 18, 18),
}

# Softer than the objects' colours of the same name, so that both match the name but still differ.
BACKGROUND_COLORS: dict[str, tuple[int, int, int]] = {
    "white": (236, 236, 232),
    "gray": (132, 134, 138),
    "black": (34, 34, 38),
    "green": (112, 176, 116),
    "blue": (116, 156, 220),
    "yellow": (232, 214, 136),
    "pink": (238, 190, 204),
    "purple": (168, 138, 196),
    "brown": (134, 94, 62),
}

SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")

# Radius of the circle around an object.
SIZES = {"small": 0.12, "medium": 0.16, "large": 0.205}

# How a background is painted, and how often. Plain ones hold many redundant tokens, textured ones few.
TEXTURES = {"plain": 0.6, "gradient": 0.1, "striped": 0.1, "checkered": 0.1, "dotted": 0.05, "speckled": 0.05}

RELATIONS = ("left of", "right of", "above", "below")

# How a caption may place a single object: the cell of a 3 × 3 grid, (column, row).
PLACES = {
    "in the top left corner": (0, 0),
    "at the top": (1, 0),
    "in the top right corner": (2, 0),
    "on the left": (0, 1),
    "in the center": (1, 1),
    "on the right": (2, 1),
    "in the bottom left corner": (0, 2),
    "at the bottom": (1, 2),
    "in the bottom right corner": (2, 2),
}

OBJECT_COUNTS = {1: 0.3, 2: 0.5, 3: 0.2}

# Fraction of the scenes with several objects whose captions state relations.
RELATED = 0.8

# Minimum distance between the centres of related objects along the relation's axis, which is the longer one.
RELATION_GAP = 0.22

_MARGIN = 0.03


@dataclass(frozen=True)
class Object:
    """One shape. ``x, y``: centre; ``radius``: of the circle around it; ``angle``: radians, small."""

    shape: str
    color: str
    size: str
    x: float
    y: float
    radius: float
    angle: float = 0.0


@dataclass(frozen=True)
class Background:
    """``color`` and ``texture`` by name; ``phase`` and ``period`` shape the texture."""

    color: str
    texture: str = "plain"
    phase: float = 0.0
    period: float = 0.25
    seed: int = 0


@dataclass(frozen=True)
class Relation:
    """``objects[subject]`` is ``name`` (one of ``RELATIONS``) ``objects[object]``."""

    subject: int
    name: str
    object: int


@dataclass(frozen=True)
class Scene:
    """Objects that do not touch, on a background.

    Attributes:
        relations: the relations that the caption states; all hold.
        place: the place of a single object, one of ``PLACES``; None if the caption does not state it.
    """

    objects: tuple[Object, ...]
    background: Background
    relations: tuple[Relation, ...] = ()
    place: str | None = None


def one_of(rng: np.random.Generator, choices: Sequence[T]) -> T:
    """Return one of ``choices``, all equally likely (many times faster than ``rng.choice``)."""
    return choices[int(rng.random() * len(choices))]


def _weighted(rng: np.random.Generator, weights: Mapping[T, float]) -> T:
    """Return one of the keys, with probability proportional to its value."""
    drawn = rng.random() * sum(weights.values())
    return next(
        key for key, up_to in zip(weights, itertools.accumulate(weights.values()), strict=True) if drawn < up_to
    )


def _apart(candidate: tuple[float, float, float], others: list[tuple[float, float, float]]) -> bool:
    x, y, radius = candidate
    return all(math.hypot(x - a, y - b) > radius + r + _MARGIN for a, b, r in others)


def _position(rng: np.random.Generator, radius: float) -> tuple[float, float, float]:
    low, high = radius + _MARGIN, 1 - radius - _MARGIN
    return (low + (high - low) * rng.random(), low + (high - low) * rng.random(), radius)


def holds(relation: str, first: tuple[float, float], second: tuple[float, float], gap: float = 0.0) -> bool:
    """Whether the centre ``first`` is ``relation`` the centre ``second``, by more than ``gap``; ``(x, y)``, y down."""
    dx, dy = second[0] - first[0], second[1] - first[1]
    return {"left of": dx, "right of": -dx, "above": dy, "below": -dy}[relation] > gap


def _clearly(relation: str, first: tuple[float, ...], second: tuple[float, ...]) -> bool:
    dx, dy = abs(second[0] - first[0]), abs(second[1] - first[1])
    longer = dx > dy if relation in ("left of", "right of") else dy > dx
    return longer and holds(relation, first[:2], second[:2], RELATION_GAP)


def _positions(
    rng: np.random.Generator, radii: list[float], relation: str | None
) -> list[tuple[float, float, float, int]] | None:
    """Draw circles that do not touch, each ``relation`` the next; None on failure.

    Returns:
        ``(x, y, radius, index in radii)`` for each.
    """
    found: list[tuple[float, float, float]] = []
    for radius in radii:
        low, high = radius + _MARGIN, 1 - radius - _MARGIN
        candidate = (low + (high - low) * rng.random(), low + (high - low) * rng.random(), radius)
        if not _apart(candidate, found):
            return None
        found.append(candidate)
    circles = [(*circle, n) for n, circle in enumerate(found)]
    if relation is None:
        return circles
    # All objects draw sizes from the same distribution, so any object may get any circle: sort them along the axis.
    axis = 0 if relation in ("left of", "right of") else 1
    circles.sort(key=lambda circle: circle[axis], reverse=relation in ("right of", "below"))
    return circles if all(_clearly(relation, a, b) for a, b in itertools.pairwise(circles)) else None


def _placed(rng: np.random.Generator, radius: float, place: str) -> list[tuple[float, float, float, int]]:
    low, high = radius + _MARGIN, 1 - radius - _MARGIN
    x, y = ((low, 0.5, high)[cell] + 0.08 * (rng.random() - 0.5) for cell in PLACES[place])
    return [(min(max(x, low), high), min(max(y, low), high), radius, 0)]


def sample_scene(rng: np.random.Generator) -> Scene:
    """Draw a scene. The same state of ``rng`` gives the same scene."""
    count = _weighted(rng, OBJECT_COUNTS)
    background = Background(
        one_of(rng, tuple(BACKGROUND_COLORS)),
        _weighted(rng, TEXTURES),
        float(rng.uniform(0, 1)),
        float(rng.uniform(0.15, 0.3)),
        int(rng.integers(2**31)),
    )
    colors = [name for name in COLORS if name != background.color]
    kinds: list[tuple[str, str]] = []
    while len(kinds) < count:
        kind = (one_of(rng, SHAPES), one_of(rng, colors))
        if kind not in kinds:
            kinds.append(kind)
    place = one_of(rng, tuple(PLACES)) if count == 1 and rng.random() < 0.5 else None
    relation = one_of(rng, RELATIONS) if count > 1 and rng.random() < RELATED else None
    circles = None
    while circles is None:
        sizes = [one_of(rng, tuple(SIZES)) for _ in range(count)]
        radii = [SIZES[size] * (0.94 + 0.12 * rng.random()) for size in sizes]
        circles = _positions(rng, radii, relation) if place is None else _placed(rng, radii[0], place)
    objects = tuple(
        Object(shape, color, sizes[n], x, y, radius, 0.24 * (rng.random() - 0.5))
        for (shape, color), (x, y, radius, n) in zip(kinds, circles, strict=True)
    )
    relations = () if relation is None else tuple(Relation(n, relation, n + 1) for n in range(count - 1))
    return Scene(objects, background, relations, place)
