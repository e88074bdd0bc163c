"""Our model classes become known to transformers when transformers is used, not before.

`import prunekit` alone lets `AutoModelForCausalLM.from_pretrained` load models whose layers differ in size, and yet
loads neither torch nor transformers: the classes are registered when the Auto classes have been imported.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

AUTO = "transformers.models.auto.configuration_auto"  # imported by all that opens a model by its config


def arrange() -> None:
    """Register now where the Auto classes are there, else as soon as they are."""
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
        self.under_way = 0

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname.partition(".")[0] != "transformers" or self not in sys.meta_path:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _Watched(spec.loader, self)
        return spec

    def done(self) -> None:
        """One import is over."""
        self.under_way -= 1
        if self.under_way == 0 and AUTO in sys.modules and self in sys.meta_path:
            sys.meta_path.remove(self)
            register()


class _Watched(Loader):
    """A loader that says when its module is there."""

    def __init__(self, loader: Any, finder: _Finder) -> None:
        self.loader, self.finder = loader, finder

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.finder.under_way += 1
        try:
            self.loader.exec_module(module)
        finally:
            self.finder.done()

    def __getattr__(self, name: str) -> Any:  # get_data, get_source, ...: whatever else is asked of a loader
        return getattr(self.loader, name)
