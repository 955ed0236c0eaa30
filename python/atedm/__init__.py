"""AT-EDM for diffusers: token pruning that makes Stable Diffusion XL faster, with no training."""

from atedm.plugin import applied, apply, pruned_blocks, record, remove
from atedm.schedule import DSAP
from atedm_kernels import __version__

__all__ = ["DSAP", "__version__", "applied", "apply", "pruned_blocks", "record", "remove"]
