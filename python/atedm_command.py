"""The command ``atedm``.

It lies outside of the package, whose import raises without diffusers: a command names the extra in one line.
"""

from atedm_extras import COMMAND, require


def main() -> None:
    require("diffusers", *COMMAND)
    from atedm.cli import main as run

    run()
