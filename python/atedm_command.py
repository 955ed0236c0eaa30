"""The commands ``atedm`` and ``atedm-bench``.

They are outside of the packages: without diffusers ``import atedm`` raises, and a foreign file may hide a package. A
command names the missing extra, or that file, in one line instead.
"""

import sys

from atedm_extras import COMMAND, require

# Commands of atedm-bench that need the extra "quality"; the others need "bench".
_QUALITY = ("quality", "train", "overview")


def main() -> None:
    require("diffusers", *COMMAND)
    from atedm.cli import main as run

    run()


def bench() -> None:
    extra = "quality" if sys.argv[1:] and sys.argv[1] in _QUALITY else "bench"
    require(extra, *COMMAND, own=("atedm_bench",))
    from atedm_bench.cli import main as run

    run()
