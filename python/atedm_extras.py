"""The lines that name the extra to install if a package is missing, or what hides a package.

This module is outside of the packages: without diffusers ``import atedm`` raises, and a command must report that as one
line, without a traceback. It imports only the standard library.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

# The import names of distributions, if they differ.
_MODULES = {"pillow": "PIL", "pyyaml": "yaml", "torch-fidelity": "torch_fidelity"}

# A file of each package, which a folder that hides the package does not have.
_OWN = {"atedm": "unet/attach.py", "atedm_kernels": "registry.py", "atedm_bench": "measure.py"}

# The packages that every command imports.
_ALWAYS = ("atedm", "atedm_kernels")

# The packages that every command needs, for `import atedm` and for the command line itself.
COMMAND = ("diffusers", "typer", "rich")


def missing(*packages: str) -> list[str]:
    """The ``packages`` (names on PyPI) that are not installed."""
    return [name for name in packages if not _is_installed(_MODULES.get(name, name))]


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ValueError:  # sys.modules has None for the module, which hides it
        return False


def hidden(module: str) -> str | None:
    """The line about a foreign folder or file that Python finds instead of the package ``module``; None if there is
    none."""
    spec = importlib.util.find_spec(module)
    places = [] if spec is None else [*(spec.submodule_search_locations or [spec.origin])]
    if spec is None or any((Path(place) / _OWN[module]).is_file() for place in places):
        return None
    return f"{places[0]} hides the package {module} of atedm-kernels; expected another working directory or name"


def hint(extra: str, packages: list[str]) -> str:
    """The line about missing ``packages``, which ``extra`` installs."""
    return f"{', '.join(packages)} not installed; pip install 'atedm-kernels[{extra}]'"


def require(extra: str, *packages: str, own: tuple[str, ...] = ()) -> None:
    """Exit with a line and status 1 if one of ``packages`` is missing, or a package of this distribution is hidden.

    Args:
        extra: what installs ``packages``. own: the packages of this distribution that the caller imports besides those
            that every command does.
    """
    for line in filter(None, map(hidden, (*_ALWAYS, *own))):
        sys.exit(f"Error: {line}")
    absent = missing(*packages)
    if absent:
        sys.exit(f"Error: {hint(extra, absent)}")
