"""The entry point of the command ``atedm-bench``."""

import sys

from atedm_extras import COMMAND, require

# Commands that need the extra "quality"; the others need "bench".
_QUALITY = ("quality", "train", "overview")


def main() -> None:
    require("quality" if sys.argv[1:] and sys.argv[1] in _QUALITY else "bench", *COMMAND)
    from atedm_bench.cli import main as run

    run()
