"""The line that names the extra if a package is missing.

The module lies beside the packages: without diffusers ``import atedm`` raises, and a command must report that without a
traceback. It imports only the standard library.
"""

from __future__ import annotations

import importlib.util
import sys

# The import name of a distribution, where it differs.
_MODULES = {"pillow": "PIL", "pyyaml": "yaml"}

# What every command needs: `import atedm`, and the command line itself.
COMMAND = ("diffusers", "typer", "rich")


def missing(*packages: str) -> list[str]:
    """Those of ``packages`` (names on PyPI) that are not installed."""
    return [name for name in packages if not _is_installed(_MODULES.get(name, name))]


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ValueError:  # sys.modules holds None, which hides it
        return False


def hint(extra: str, packages: list[str]) -> str:
    """The line about missing ``packages`` that ``extra`` installs."""
    return f"{', '.join(packages)} not installed; pip install 'atedm-kernels[{extra}]'"


def require(extra: str, *packages: str) -> None:
    """Exit with that line and status 1 if one of ``packages`` is missing."""
    absent = missing(*packages)
    if absent:
        sys.exit(f"Error: {hint(extra, absent)}")
