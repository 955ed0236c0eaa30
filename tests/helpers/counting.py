"""Counting FLOPs takes seconds; tests that count the same UNet again and again may share what is counted."""

import json
from collections.abc import Callable

from atedm.app.flops import UNetFlops


def shared_counters() -> Callable[..., UNetFlops]:
    """In the place of :class:`UNetFlops`: one counter for each UNet and size, which counts each question once."""
    counters: dict[str, UNetFlops] = {}

    def counter(config, **size):
        # Without the folder that it was read from.
        plain = {name: value for name, value in config.items() if not name.startswith("_")}
        key = json.dumps([plain, size], sort_keys=True)
        if key not in counters:
            counters[key] = UNetFlops(config, **size)
        return counters[key]

    return counter
