"""Judges whether a picture shows what was asked, by rules over what the checker sees."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from atedm_bench.quality.checker import Found
from atedm_bench.scenes import Scene
from atedm_bench.scenes.scene import holds


@dataclass(frozen=True)
class Verdict:
    """What is right and wrong in a picture.

    ``objects``: number of the ``asked`` objects that are there, in shape and colour. ``relations``: number of the
    ``relations_asked`` that hold. ``extra``: number of objects that nobody asked for.
    """

    asked: int
    objects: int
    relations_asked: int
    relations: int
    extra: int

    @property
    def right(self) -> bool:
        """Whether every asked object is there and every asked relation holds."""
        return self.objects == self.asked and self.relations == self.relations_asked


def judge(scene: Scene, found: Sequence[Found]) -> Verdict:
    """Compare what was asked (``scene``) with what was ``found``. Positions matter only for the asked relations.

    Found objects that look alike are assigned so that most relations hold.
    """
    candidates = [
        [n for n, seen in enumerate(found) if (seen.shape, seen.color) == (item.shape, item.color)] + [None]
        for item in scene.objects
    ]
    best = (0, 0)
    for chosen in itertools.product(*candidates):
        used = [n for n in chosen if n is not None]
        if len(set(used)) < len(used):
            continue
        there = [None if n is None else found[n] for n in chosen]
        relations = sum(
            there[r.subject] is not None
            and there[r.object] is not None
            and holds(r.name, (there[r.subject].x, there[r.subject].y), (there[r.object].x, there[r.object].y))
            for r in scene.relations
        )
        best = max(best, (sum(item is not None for item in there), relations))
    return Verdict(len(scene.objects), best[0], len(scene.relations), best[1], max(0, len(found) - best[0]))
