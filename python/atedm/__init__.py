"""Feature reuse and token pruning (AT-EDM) that make Stable Diffusion XL in diffusers faster, with no training."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from atedm_extras import hidden, hint, missing

if TYPE_CHECKING:
    from atedm.app.pictures import plot
    from atedm.policy.adaptive import Adaptive
    from atedm.policy.options import PRESETS, Options
    from atedm.policy.schedule import DSAP, KINDS, Every, Schedule
    from atedm.unet.attach import applied, apply, pruned_blocks, record, remove
    from atedm.unet.errors import RankedNaN
    from atedm_kernels import __version__

if missing("diffusers"):
    raise ModuleNotFoundError(hint("diffusers", ["diffusers"]), name="diffusers")

if hidden("atedm_kernels"):
    raise ImportError(hidden("atedm_kernels"), name="atedm_kernels")

# Loaded on first use, because torch and diffusers take seconds to load and `atedm --help` does not need them.
_HOMES = {
    "Adaptive": "atedm.policy.adaptive",
    "DSAP": "atedm.policy.schedule",
    "Every": "atedm.policy.schedule",
    "KINDS": "atedm.policy.schedule",
    "Options": "atedm.policy.options",
    "PRESETS": "atedm.policy.options",
    "RankedNaN": "atedm.unet.errors",
    "Schedule": "atedm.policy.schedule",
    "__version__": "atedm_kernels",
    "applied": "atedm.unet.attach",
    "apply": "atedm.unet.attach",
    "plot": "atedm.app.pictures",
    "pruned_blocks": "atedm.unet.attach",
    "record": "atedm.unet.attach",
    "remove": "atedm.unet.attach",
}

__all__ = [
    "DSAP",
    "KINDS",
    "PRESETS",
    "Adaptive",
    "Every",
    "Options",
    "RankedNaN",
    "Schedule",
    "__version__",
    "applied",
    "apply",
    "plot",
    "pruned_blocks",
    "record",
    "remove",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
