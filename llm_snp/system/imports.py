"""Something to do once a module has been imported, by whomever, without importing it first."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


def when_imported(name: str, action: Callable[[], None]) -> None:
    """Call `action` once the top-level module `name` is there: now if it is, otherwise at the end of its import.

    By then nothing below `name` is being imported by the same thread, so that `action` may import any of it, and other
    threads that import `name` wait for it. If it has an `ImportError` then, that is a warning: whoever imports
    `name` did not ask for `action`. Asking again for the same module is harmless. Nothing else of the interpreter is
    changed, and after the import that is undone, too.
    """
    if sys.modules.get(name) is not None:
        action()
    elif not any(isinstance(finder, _Finder) and finder.name == name for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder(name, action))


class _Finder(MetaPathFinder):
    """Finds one module as the others do, but with a loader that calls `action` in the end."""

    def __init__(self, name: str, action: Callable[[], None]):
        self.name, self.action = name, action

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self.name:
            return None
        for finder in [*sys.meta_path]:
            # Not every finder has the method: until Python 3.12 `find_module` was enough.
            find = getattr(finder, "find_spec", None)
            spec = None if finder is self or find is None else find(fullname, path, target)
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _Loader(spec.loader, self)
                return spec  # type: ignore[no-any-return]
        return None


class _Loader(Loader):
    """`loader`, which has its place back before it begins."""

    def __init__(self, loader: Loader, finder: _Finder):
        self._loader, self._finder = loader, finder

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        # After an error the module is not there, and the finder stays for the next attempt.
        if self._finder in sys.meta_path:
            sys.meta_path.remove(self._finder)
        try:
            self._finder.action()
        except ImportError as error:
            warnings.warn(f"not done after the import of {self._finder.name}: {error}", RuntimeWarning, stacklevel=2)
