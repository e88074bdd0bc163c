"""Our model classes become known to transformers when transformers is used, not before.

`import prunekit` alone lets `AutoModelForCausalLM.from_pretrained` load models whose layers differ in size, and yet
loads neither torch nor transformers: the classes are registered when the Auto classes have been imported.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from threading import Lock
from types import ModuleType
from typing import Any

AUTO = "transformers.models.auto.configuration_auto"  # imported by all that opens a model by its config
CLASSES = "prunekit.models.classes"  # imports AUTO itself, and must be whole before it is used


def arrange() -> None:
    """Register now if the Auto classes are there, else as soon as they are."""
    if AUTO in sys.modules:
        register()
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def register() -> None:
    """Let the Auto classes of transformers load `prunekit_*` models: our classes do so when they have been imported."""
    import_module("prunekit.models.classes")


class _Finder(MetaPathFinder):
    """Watches imports of transformers: when none is under way and the Auto classes are there, ours are registered.

    Not in the middle of one, because our classes derive from those that are being imported.
    """

    def __init__(self) -> None:
        self._under_way, self._lock = 0, Lock()

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """What the finders behind this one find, with a loader that tells when it begins and ends."""
        if (fullname.partition(".")[0] != "transformers" and fullname != CLASSES) or self not in sys.meta_path:
            return None
        finders = [f for f in sys.meta_path[sys.meta_path.index(self) + 1 :] if hasattr(f, "find_spec")]
        spec = next((s for finder in finders if (s := finder.find_spec(fullname, path, target)) is not None), None)
        if spec is not None and hasattr(spec.loader, "exec_module"):
            spec.loader = _Watched(spec.loader, self)
        return spec

    def begin(self) -> None:
        """An import has begun."""
        with self._lock:
            self._under_way += 1

    def end(self) -> None:
        """An import is over."""
        with self._lock:
            self._under_way -= 1
            if self._under_way or AUTO not in sys.modules or self not in sys.meta_path:
                return
            sys.meta_path.remove(self)
        try:
            register()
        except BaseException:
            sys.meta_path.insert(0, self)  # the next import says it again: half-registered would be worse
            raise


class _Watched(Loader):
    """A loader that tells when its module is loaded, and leaves no trace in it."""

    def __init__(self, loader: Any, finder: _Finder) -> None:
        self._loader, self._finder = loader, finder

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        self._finder.begin()
        try:
            self._loader.exec_module(module)
        finally:
            self._finder.end()

    def __getattr__(self, name: str) -> Any:  # get_data, get_source, ...: whatever else is asked of a loader
        return getattr(self._loader, name)
