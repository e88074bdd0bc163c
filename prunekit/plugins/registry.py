"""Name -> plug-in, through entry points, imported on first use.

Built-ins come through the same door as a third party's: a distribution declares an entry point in
one of the groups below, and its name is known to recipes, the command line and the suites.
"""

from __future__ import annotations

import dataclasses
import inspect
import pkgutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from typing import TYPE_CHECKING, Any, Generic, TypeVar, cast, get_args, get_type_hints

from pydantic import TypeAdapter, ValidationError
from pydantic.errors import PydanticSchemaGenerationError

from prunekit.errors import WrongInput, unknown
from prunekit.plugins.source import Written, written

if TYPE_CHECKING:
    from prunekit.plugins.adapter import ModelAdapter
    from prunekit.plugins.allocator import Allocator
    from prunekit.plugins.engine import Engine
    from prunekit.plugins.exporter import Exporter
    from prunekit.plugins.finisher import Finisher
    from prunekit.plugins.objective import Objective
    from prunekit.plugins.pruner import LocalPruner
    from prunekit.plugins.signal import Signal
    from prunekit.space.metrics import Metric

T = TypeVar("T")


class UnknownName(WrongInput, LookupError):
    """A name nobody registered."""


@dataclass(frozen=True)
class Option:
    """One hyper-parameter of a plug-in."""

    name: str
    type: str
    default: Any
    hint: Any = None  # the type itself


@dataclass(frozen=True)
class Entry:
    """One registered plug-in, not yet imported."""

    kind: str
    name: str
    owner: str  # the distribution it comes from
    point: metadata.EntryPoint

    def load(self) -> type:
        """Import it.

        Raises:
            ImportError: something it needs is not installed; says what.
        """
        try:
            return self.point.load()
        except ImportError as error:
            missing = getattr(error, "name", None) or str(error)
            raise ImportError(
                f"{self.kind} {self.name!r} of {self.owner} needs {missing!r}, which is not installed: "
                f"pip install {missing}"
            ) from error

    @property
    def _written(self) -> Written | None:
        return written(f"{self.point.module}:{self.point.attr}")

    @property
    def doc(self) -> str:
        """Its docstring. It is imported only where its source cannot be read.

        Raises:
            ImportError: as of `load`.
        """
        return self._written.doc if self._written is not None else inspect.getdoc(self.load()) or ""

    @property
    def summary(self) -> str:
        """First line of its docstring."""
        return self.doc.strip().split("\n")[0]

    @property
    def missing(self) -> tuple[str, ...]:
        """Packages that it needs and that are not installed, as far as its source tells."""
        return self._written.missing if self._written is not None else ()

    @property
    def options(self) -> tuple[Option, ...]:
        """Its fields with types and defaults; nested plug-ins by the repr of their default."""
        loaded = self.load()
        if not dataclasses.is_dataclass(loaded):
            return ()
        hints = get_type_hints(loaded)  # so that a named type says what it allows
        return tuple(
            Option(f.name, _type_name(hints[f.name]), _default(f), hints[f.name])
            for f in dataclasses.fields(loaded)
            if f.init
        )


class Registry(Mapping[str, Entry], Generic[T]):
    """The plug-ins of one kind, by name."""

    def __init__(self, kind: str, contract: str) -> None:
        """`contract`: where the class is that all of them derive from, as module:name; imported when it is needed."""
        self.kind, self.group, self._contract = kind, f"prunekit.{kind}s", contract

    @property
    def contract(self) -> type[T]:
        """The class that all of them derive from."""
        return pkgutil.resolve_name(self._contract)

    @property
    def summary(self) -> str:
        """What plug-ins of this kind do: first line of the contract's docstring."""
        return found.doc.split("\n")[0] if (found := written(self._contract)) is not None else ""

    @property
    def _entries(self) -> dict[str, Entry]:
        return _entries(self.kind, self.group)

    def __getitem__(self, name: str) -> Entry:
        if name not in self._entries:
            raise UnknownName(unknown(self.kind, name, self._entries))
        return self._entries[name]

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def build(self, spec: str | Mapping[str, Any]) -> T:
        """A plug-in from its name, or from {name: ..., option: value}; fields that are plug-ins nest.

        Options of such a field without a name are of its default: {name: tyr, inner: {generations: 5}}.

        Raises:
            UnknownName: no such plug-in.
            ValueError: an option it does not have, or a value it refuses.
        """
        options = {"name": spec} if isinstance(spec, str) else dict(spec)
        name = options.pop("name", None)
        if not isinstance(name, str):
            raise WrongInput(f"a {self.kind} is given by its name, or as {{name: ..., option: value}}, not {spec!r}")
        loaded = self[name].load()
        if not (inspect.isclass(loaded) and issubclass(loaded, self.contract)):
            raise ValueError(f"{self.kind} {name!r} is not a {self.contract.__name__} but {loaded!r}")
        fields = dataclasses.fields(loaded) if dataclasses.is_dataclass(loaded) else ()
        known = {f.name: f for f in fields if f.init}
        for option in options:
            if option not in known:
                raise WrongInput(unknown(f"option of {self.kind} {name!r}", option, known))
        hints = get_type_hints(loaded) if options else {}
        try:
            values = {option: _typed(known[option], hints[option], value) for option, value in options.items()}
            return cast(T, loaded(**values))
        except WrongInput:
            raise
        except (TypeError, ValueError) as error:
            raise WrongInput(f"{self.kind} {name!r}: {error}") from error

    def name_of(self, plugin: object) -> str | None:
        """The name under which a plug-in's class is registered."""
        return next(
            (
                n
                for n, e in self._entries.items()
                if e.point.value.endswith(f":{type(plugin).__name__}") and e.load() is type(plugin)
            ),
            None,
        )

    def spec(self, plugin: Any) -> dict[str, Any]:
        """The inverse of `build`: name and all options of a plug-in."""
        name = self.name_of(plugin)
        if name is None:
            raise ValueError(f"{plugin!r} is not registered as a {self.kind}; a recipe cannot name it")
        options = {f.name: getattr(plugin, f.name) for f in dataclasses.fields(plugin) if f.init}
        return {"name": name} | {k: plain(v) for k, v in options.items()}


PRUNERS: Registry[LocalPruner] = Registry("pruner", "prunekit.plugins.pruner:LocalPruner")
SIGNALS: Registry[Signal] = Registry("signal", "prunekit.plugins.signal:Signal")
ALLOCATORS: Registry[Allocator] = Registry("allocator", "prunekit.plugins.allocator:Allocator")
OBJECTIVES: Registry[Objective] = Registry("objective", "prunekit.plugins.objective:Objective")
FINISHERS: Registry[Finisher] = Registry("finisher", "prunekit.plugins.finisher:Finisher")
METRICS: Registry[Metric] = Registry("metric", "prunekit.space.metrics:Metric")
EXPORTERS: Registry[Exporter] = Registry("exporter", "prunekit.plugins.exporter:Exporter")
ADAPTERS: Registry[ModelAdapter] = Registry("adapter", "prunekit.plugins.adapter:ModelAdapter")  # by config.model_type
ENGINES: Registry[Engine] = Registry("engine", "prunekit.plugins.engine:Engine")
KINDS: tuple[Registry[Any], ...] = (
    PRUNERS, SIGNALS, ALLOCATORS, OBJECTIVES, FINISHERS, METRICS, EXPORTERS, ENGINES, ADAPTERS,
)  # fmt: skip


def signals_of(allocator: Allocator) -> tuple[Signal, ...]:
    """What an allocator wants to have measured, built."""
    return tuple(SIGNALS.build(s) if isinstance(s, (str, Mapping)) else s for s in allocator.signals)


@cache
def _entries(kind: str, group: str) -> dict[str, Entry]:
    found: dict[str, Entry] = {}
    for point in metadata.entry_points(group=group):
        owner = point.dist.name if point.dist is not None else "unknown"
        entry = Entry(kind, point.name, owner, point)
        if (other := found.get(point.name)) is not None and other.point.value != point.value:
            raise ValueError(f"two {kind}s are called {point.name!r}: of {other.owner} and of {owner}; uninstall one")
        found[point.name] = entry
    return dict(sorted(found.items()))


def _typed(field: dataclasses.Field[Any], hint: Any, value: Any) -> Any:
    """A recipe's value as the field's type asks for it: a plug-in from its spec, tuples from lists, numbers checked."""
    for registry in KINDS:
        if registry.contract in (hint, *get_args(hint)):
            if isinstance(value, Mapping) and "name" not in value and isinstance(default := _default(field), Mapping):
                value = {**default, **value}
            return registry.build(value) if isinstance(value, (str, Mapping)) else value
    try:
        return TypeAdapter(hint).validate_python(value)
    except PydanticSchemaGenerationError:  # a type of the plug-in's own
        return value
    except ValidationError as error:
        raise ValueError(f"{field.name} takes {_type_name(hint)}, not {value!r}") from error


def _type_name(hint: Any) -> str:
    return getattr(hint, "__name__", str(hint)) if not get_args(hint) else str(hint).replace("typing.", "")


def plain(value: Any) -> Any:
    """A value as a recipe has it: plug-ins, also those in a list, by name and options.

    Raises:
        ValueError: a plug-in's class is not registered.
    """
    for registry in KINDS:
        if isinstance(value, registry.contract):
            return registry.spec(value)
    return [plain(v) for v in value] if isinstance(value, (tuple, list)) else value


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default is not dataclasses.MISSING:
        return plain(field.default)
    if field.default_factory is not dataclasses.MISSING:
        return plain(field.default_factory())
    return None
