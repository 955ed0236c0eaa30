"""Shares FLOP counters between tests: counting takes seconds, and many tests count the same UNet."""

import json
from collections.abc import Callable

from atedm.app.flops import UNetFlops


def shared_counters() -> Callable[..., UNetFlops]:
    """Return a replacement for :class:`UNetFlops` that makes one counter per UNet and size, and counts only once."""
    counters: dict[str, UNetFlops] = {}

    def counter(config, **size):
        # Leave out private keys, such as the folder from which the configuration was read.
        plain = {name: value for name, value in config.items() if not name.startswith("_")}
        key = json.dumps([plain, size], sort_keys=True)
        if key not in counters:
            counters[key] = UNetFlops(config, **size)
        return counters[key]

    return counter
