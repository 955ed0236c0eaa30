"""The lines that name the extra if a package is missing, and what hides a package.

The module lies beside the packages: without diffusers ``import atedm`` raises, and a command must report that without a
traceback. It imports only the standard library.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

# The import name of a distribution, where it differs.
_MODULES = {"pillow": "PIL", "pyyaml": "yaml"}

# A file of each package, which a folder that hides it does not have.
_OWN = {"atedm": "unet/attach.py", "atedm_kernels": "registry.py"}

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


def hidden(module: str) -> str | None:
    """The line about a folder or file of another's that Python finds in place of this package; None where none does."""
    spec = importlib.util.find_spec(module)
    places = [] if spec is None else [*(spec.submodule_search_locations or [spec.origin])]
    if spec is None or any((Path(place) / _OWN[module]).is_file() for place in places):
        return None
    return f"{places[0]} hides the package {module} of atedm-kernels; expected another working directory or name"


def hint(extra: str, packages: list[str]) -> str:
    """The line about missing ``packages`` that ``extra`` installs."""
    return f"{', '.join(packages)} not installed; pip install 'atedm-kernels[{extra}]'"


def require(extra: str, *packages: str) -> None:
    """Exit with a line and status 1 if one of ``packages`` is missing, or one of atedm's is hidden."""
    for line in filter(None, map(hidden, _OWN)):
        sys.exit(f"Error: {line}")
    absent = missing(*packages)
    if absent:
        sys.exit(f"Error: {hint(extra, absent)}")
