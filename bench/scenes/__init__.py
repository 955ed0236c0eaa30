"""Procedural scenes: a few coloured shapes on a background, with captions. Seeded, endless, no download.

They train the embedded model (``bench/training``) and judge it (``bench/quality``).
"""

from atedm_bench.scenes.captions import caption
from atedm_bench.scenes.render import render
from atedm_bench.scenes.scene import COLORS, SHAPES, Background, Object, Relation, Scene, sample_scene

__all__ = ["COLORS", "SHAPES", "Background", "Object", "Relation", "Scene", "caption", "render", "sample_scene"]
