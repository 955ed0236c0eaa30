"""The commands ``atedm`` and ``atedm-bench``, and the one line that names the extra where a package is missing.

A module beside the packages: without diffusers ``import atedm`` raises, and a command says so without a traceback. It
imports the standard library alone.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys

# What a distribution is imported as, where that is another name.
_MODULES = {"pillow": "PIL", "pyyaml": "yaml"}

# What every command needs: `import atedm`, and the command line itself.
COMMAND = ("diffusers", "typer", "rich")


def missing(*packages: str) -> list[str]:
    """Those of ``packages``, by their names on PyPI, that are not installed."""
    return [name for name in packages if not _is_installed(_MODULES.get(name, name))]


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ValueError:  # sys.modules holds None, which hides it
        return False


def hint(extra: str, packages: list[str]) -> str:
    """The line about missing ``packages`` that ``extra`` brings."""
    return f"{', '.join(packages)} not installed; pip install 'atedm-kernels[{extra}]'"


def require(extra: str, *packages: str) -> None:
    """End the program with that line and status 1 where one of ``packages`` is missing."""
    absent = missing(*packages)
    if absent:
        sys.exit(f"Error: {hint(extra, absent)}")


def atedm() -> None:
    """The command ``atedm``."""
    require("diffusers", *COMMAND)
    importlib.import_module("atedm.cli").main()


def atedm_bench() -> None:
    """The command ``atedm-bench``."""
    require("bench", *COMMAND)
    importlib.import_module("atedm_bench.cli").main()
