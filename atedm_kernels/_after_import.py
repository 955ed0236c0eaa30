"""Doing something when a module has been imported, by whoever wants it first."""

from __future__ import annotations

import importlib.abc
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

Callback = Callable[[ModuleType], None]


class _AfterImport(importlib.abc.MetaPathFinder):
    """Finds what it is asked about as Python would, and calls back when the module has been executed."""

    def __init__(self) -> None:
        self.callbacks: dict[str, list[Callback]] = {}

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        spec = PathFinder.find_spec(fullname, path, target) if fullname in self.callbacks else None
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_tell(module: ModuleType) -> None:
                execute(module)
                for callback in self.callbacks[fullname]:
                    callback(module)

            spec.loader.exec_module = execute_and_tell
        return spec


_finder = _AfterImport()


def after_import(module: str, callback: Callback) -> None:
    """Call back with ``module``: now where it is imported already, and after each import from now on."""
    if _finder not in sys.meta_path:
        sys.meta_path.insert(0, _finder)
    _finder.callbacks.setdefault(module, []).append(callback)
    if module in sys.modules:
        callback(sys.modules[module])
