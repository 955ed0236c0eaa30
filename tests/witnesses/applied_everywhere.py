"""A pytest plug-in: every UNet that diffusers builds is pruned with ratio 0 before it first runs.

A line for each of them, "in force" or why not, goes into the file that ``$WITNESSED`` names.
"""

import functools
import logging
import os

from diffusers import UNet2DConditionModel

import atedm
from atedm.policy.options import PUBLISHED

logging.getLogger("atedm").setLevel(logging.ERROR)  # that nothing is pruned is meant

_build = UNet2DConditionModel.__init__


@functools.wraps(_build)  # diffusers reads its signature
def _build_pruned(self, *args, **kwargs):
    _build(self, *args, **kwargs)
    try:
        atedm.apply(self, PUBLISHED, ratio=0.0)
        outcome = "in force"
    except ValueError as error:  # a UNet without attention blocks that can be pruned
        outcome = " ".join(str(error).split())
    with open(os.environ["WITNESSED"], "a") as lines:
        lines.write(f"{outcome}\n")


UNet2DConditionModel.__init__ = _build_pruned
