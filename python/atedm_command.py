"""The command ``atedm``.

It is outside of the package ``atedm``, whose import raises without diffusers: a command names the missing extra in one
line instead.
"""

from atedm_extras import COMMAND, require


def main() -> None:
    require("diffusers", *COMMAND)
    from atedm.cli import main as run

    run()
