"""AT-EDM for diffusers: token pruning that makes Stable Diffusion XL faster, with no training."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from atedm_extras import hint, missing

if TYPE_CHECKING:
    from atedm.options import PRESETS, Options
    from atedm.pictures import plot
    from atedm.plugin import applied, apply, pruned_blocks, record, remove
    from atedm.schedule import DSAP
    from atedm_kernels import __version__

if missing("diffusers"):
    raise ModuleNotFoundError(hint("diffusers", ["diffusers"]), name="diffusers")

# Loaded when first asked for: torch and diffusers take seconds, which `atedm --help` need not.
_HOMES = {
    "DSAP": "atedm.schedule",
    "Options": "atedm.options",
    "PRESETS": "atedm.options",
    "__version__": "atedm_kernels",
    "applied": "atedm.plugin",
    "apply": "atedm.plugin",
    "plot": "atedm.pictures",
    "pruned_blocks": "atedm.plugin",
    "record": "atedm.plugin",
    "remove": "atedm.plugin",
}

__all__ = [
    "DSAP",
    "PRESETS",
    "Options",
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
