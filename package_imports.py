"""How the modules find each other if the folder was put into somebody else's package.

The modules import each other by their plain names (`from config import Config`): that is what scripts, tests and mypy
want of a flat folder. In `router/services/state_gateway/` it is wrong: there `config` is the router's own module, or
none. So gateway.py, which is imported first there, calls `install`. From then on each module of the folder that is
loaded as a submodule of the package gets an `__import__` of its own, for which the plain name of a module of the folder
means that module. This is what `exec` documents: code finds what is built in in `__builtins__` of its globals.

Nothing is added to sys.path, sys.modules has the modules under their full names only, and the imports of all other
modules are as they were.
"""

from __future__ import annotations

import builtins
import importlib
import pkgutil
import sys
from collections.abc import Mapping, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any


def install(package: str) -> None:
    """Have the modules of the folder, which is the package of that name, find each other; twice is harmless."""
    if not any(isinstance(finder, _Finder) and finder.package == package for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder(package))


class _Finder(MetaPathFinder):
    """Finds the modules of one package, and gives each the `__import__` that finds its siblings."""

    def __init__(self, package: str) -> None:
        self.package = package
        self._siblings = {module.name for module in pkgutil.iter_modules(sys.modules[package].__path__)}
        self._builtins = {**vars(builtins), "__import__": self._import}

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        package, _, name = fullname.rpartition(".")
        if package != self.package or name not in self._siblings:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, self._builtins)
        return spec

    def _import(
        self,
        name: str,
        globals: Mapping[str, object] | None = None,  # noqa: A002
        locals: Mapping[str, object] | None = None,  # noqa: A002
        fromlist: Sequence[str] = (),
        level: int = 0,
    ) -> ModuleType:
        if level == 0 and name in self._siblings:
            return importlib.import_module(f"{self.package}.{name}")
        return builtins.__import__(name, globals, locals, fromlist, level)


class _Loader(Loader):
    """Another loader, and what is built in for the modules that it loads."""

    def __init__(self, loader: Loader, own_builtins: Mapping[str, object]) -> None:
        self._loader = loader
        self._own_builtins = own_builtins

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        vars(module)["__builtins__"] = self._own_builtins
        self._loader.exec_module(module)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)  # get_source and get_data, for tracebacks and debuggers
