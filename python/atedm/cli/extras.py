"""Packages that only some commands need."""

from __future__ import annotations

import importlib.util

import typer


def require(extra: str, *packages: str) -> None:
    """End with a hint at ``extra`` where a package that it brings is missing."""
    modules = {"pillow": "PIL"}
    missing = [name for name in packages if importlib.util.find_spec(modules.get(name, name)) is None]
    if missing:
        typer.echo(f"Error: {', '.join(missing)} not installed; pip install 'atedm-kernels[{extra}]'", err=True)
        raise typer.Exit(1)
