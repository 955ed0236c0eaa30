"""Procedural scenes: a few coloured shapes on a background, with captions. Seeded, endless, no download.

The embedded model is trained on them (``bench/training``) and judged by them (``bench/quality``).
"""

from atedm_bench.scenes.captions import caption
from atedm_bench.scenes.render import render
from atedm_bench.scenes.scene import COLORS, SHAPES, Background, Object, Relation, Scene, sample_scene

__all__ = ["COLORS", "SHAPES", "Background", "Object", "Relation", "Scene", "caption", "render", "sample_scene"]
