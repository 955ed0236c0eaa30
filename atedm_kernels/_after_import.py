"""Callbacks that run after a module has been imported, whichever code imports it."""

from __future__ import annotations

import importlib.abc
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

Callback = Callable[[ModuleType], None]


class _AfterImport(importlib.abc.MetaPathFinder):
    """Finds modules as Python does, and runs the callbacks of a module once it has been executed."""

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
    """Call ``callback`` with the module after each import of ``module``, and at once if it is already imported."""
    if _finder not in sys.meta_path:
        sys.meta_path.insert(0, _finder)
    _finder.callbacks.setdefault(module, []).append(callback)
    if module in sys.modules:
        callback(sys.modules[module])
