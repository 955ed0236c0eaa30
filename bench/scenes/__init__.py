"""Procedural scenes: a few coloured shapes on a background, with captions. Seeded, endless, no download.

The embedded model is trained on them (``bench/training``) and judged by them (``bench/quality``).
"""

from atedm.bench.scenes.captions import caption
from atedm.bench.scenes.render import render
from atedm.bench.scenes.scene import COLORS, SHAPES, Background, Object, Relation, Scene, sample_scene

__all__ = ["COLORS", "SHAPES", "Background", "Object", "Relation", "Scene", "caption", "render", "sample_scene"]
