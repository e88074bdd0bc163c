"""Name -> plug-in, through entry points, imported on first use.

Built-ins come through the same door as a third party's: a distribution declares an entry point in
one of the groups below, and its name is known to recipes, the command line and the suites.
"""

from __future__ import annotations

import dataclasses
import inspect
import pkgutil
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib import metadata
from itertools import groupby
from types import NoneType
from typing import TYPE_CHECKING, Any, Generic, TypeVar, cast, get_args, get_origin, get_type_hints

from pydantic import TypeAdapter, ValidationError
from pydantic.errors import PydanticSchemaGenerationError

from prunekit.errors import WrongInput, first_line, unknown
from prunekit.plugins import words
from prunekit.plugins.source import Written, digest_of, written
from prunekit.system.progress import warn_once

if TYPE_CHECKING:
    from prunekit.plugins.adapter import ModelAdapter
    from prunekit.plugins.allocator import Allocator
    from prunekit.plugins.engine import Engine
    from prunekit.plugins.exporter import Exporter
    from prunekit.plugins.finisher import Finisher
    from prunekit.plugins.learner import Learner
    from prunekit.plugins.objective import Objective
    from prunekit.plugins.pruner import LocalPruner
    from prunekit.plugins.signal import Signal
    from prunekit.plugins.tracker import Tracker
    from prunekit.plugins.width import Width
    from prunekit.space.metrics import Metric

T = TypeVar("T")


class UnknownName(WrongInput, LookupError):
    """A name nobody registered."""


class BrokenPlugin(WrongInput):
    """A plug-in that cannot be used: one sentence with its package and its entry point."""


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
    contract: str = "builtins:object"  # where the class is that it derives from, as module:name
    fault: str = ""  # why it cannot be used, as far as is known before it is imported

    def load(self) -> type:
        """Import it.

        Returns:
            A dataclass that derives from the contract of its kind.

        Raises:
            BrokenPlugin: it cannot be imported, or is something else; names its package and entry point.
            ImportError: a package that it needs is not installed; says which.
        """
        if self.fault:
            raise BrokenPlugin(self.fault)
        home, contract = self.point.value.partition(":")[0].partition(".")[0], pkgutil.resolve_name(self.contract)
        try:
            loaded = self.point.load()
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # SystemExit, what pytest skips with
            if isinstance(error, ModuleNotFoundError) and error.name and error.name.partition(".")[0] != home:
                raise ImportError(
                    f"{self.kind} {self.name!r} of {self.owner} needs {error.name!r}, which is not installed: "
                    f"pip install {self._installed_by(error.name.partition('.')[0])}"
                ) from error
            raise self._broken(f"cannot be imported ({type(error).__name__}: {first_line(error)})") from error
        if not (inspect.isclass(loaded) and issubclass(loaded, contract) and dataclasses.is_dataclass(loaded)):
            raise self._broken(f"is no dataclass that derives from {contract.__name__}")
        return loaded

    def _installed_by(self, module: str) -> str:
        """What to give pip for a module: the extra of its own distribution, where that has one for it.

        The extra is called as the plug-in or as the module, or a package of it is called as the module.
        """
        try:
            declared = metadata.distribution(self.owner)
        except metadata.PackageNotFoundError:
            return module
        extras = declared.metadata.get_all("Provides-Extra") or []
        pairs = [(_plain(text), re.search(r"extra\s*==\s*['\"]([^'\"]+)", text)) for text in declared.requires or ()]
        listing = [found[1] for name, found in pairs if name == _plain(module) and found is not None]
        for extra in (*(e for e in extras if _plain(e) in (_plain(self.name), _plain(module))), *sorted(listing)):
            return f"'{self.owner}[{extra}]'"
        return module

    def _broken(self, what: str) -> BrokenPlugin:
        return BrokenPlugin(
            f"{self.kind} {self.name!r} of {self.owner} is broken: {self.point.value} {what}; "
            f"repair or uninstall {self.owner}"
        )

    @property
    def _written(self) -> Written | None:
        return written(self.point.value)

    @property
    def doc(self) -> str:
        """Its docstring. It is imported only where its source cannot be read.

        Raises:
            BrokenPlugin, ImportError: as of `load`.
        """
        if self.fault:
            raise BrokenPlugin(self.fault)
        return self._written.doc if self._written is not None else inspect.getdoc(self.load()) or ""

    @property
    def summary(self) -> str:
        """First line of its docstring."""
        return self.doc.strip().split("\n")[0]

    @property
    def missing(self) -> tuple[str, ...]:
        """Packages that it needs and that are not installed, as far as its source tells."""
        return () if self.fault or self._written is None else self._written.missing

    @property
    def options(self) -> tuple[Option, ...]:
        """Its fields with types and defaults; nested plug-ins by the repr of their default."""
        loaded = self.load()
        hints = get_type_hints(loaded)  # so that a named type says what it allows
        return tuple(
            Option(name, _type_name(hints[name]), _default(field), hints[name])
            for name, field in _fields(loaded).items()
        )


def _plain(text: str) -> str:
    """The name at the beginning of a requirement, as package indexes compare names."""
    found = re.match(r"[\w.-]+", text)
    return re.sub(r"[-_.]+", "-", found[0] if found else "").lower()


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

    @cached_property
    def _entries(self) -> dict[str, Entry]:
        points = sorted(metadata.entry_points(group=self.group), key=lambda point: point.name)
        return {name: self._entry(name, list(same)) for name, same in groupby(points, key=lambda point: point.name)}

    def _entry(self, name: str, points: Sequence[metadata.EntryPoint]) -> Entry:
        """One of several that say the same, or a broken one where they do not."""
        owners = {point.value: point.dist.name if point.dist is not None else "unknown" for point in points}
        fault = ""
        if len(owners) > 1:
            claims = " and ".join(f"of {owner} ({value})" for value, owner in owners.items())
            fault = f"{len(owners)} {self.kind}s are called {name!r}, {claims}; uninstall all but one of them"
        return Entry(self.kind, name, " and ".join(owners.values()), points[0], self._contract, fault)

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

    def build(self, spec: str | Mapping[str, Any] | T) -> T:
        """A plug-in from its name, or from {name: ..., option: value}, or itself; fields that are plug-ins nest.

        Options of such a field without a name are of its default: {name: tyr, inner: {generations: 5}}.

        Raises:
            UnknownName: no such plug-in.
            BrokenPlugin, ImportError: as of `Entry.load`.
            WrongInput: an option it does not have, or a value it refuses.
        """
        if isinstance(spec, self.contract):
            return spec
        options = {"name": spec} if isinstance(spec, str) else dict(cast("Mapping[str, Any]", spec))
        name = options.pop("name", None)
        if not isinstance(name, str):
            raise WrongInput(f"a {self.kind} is given by its name, or as {{name: ..., option: value}}, not {spec!r}")
        entry = self[name]
        loaded = entry.load()
        for other in self.values():
            if other.fault:
                warn_once(other.fault)
        known = _fields(loaded)
        for option in options:
            if option not in known:
                raise WrongInput(unknown(f"option of {self.kind} {name!r}", option, known))
        try:
            hints = get_type_hints(loaded) if options else {}
            values = {option: _typed(known[option], hints[option], value) for option, value in options.items()}
            return cast(T, loaded(**values))
        except WrongInput:
            raise
        except Exception as error:  # of a plug-in's own checks too
            raise WrongInput(f"{self.kind} {name!r}: {error}") from error

    def name_of(self, plugin: object) -> str | None:
        """The name under which a plug-in's class is registered."""
        for name, entry in self._entries.items():
            if entry.point.value.endswith(f":{type(plugin).__name__}"):
                try:
                    if entry.load() is type(plugin):
                        return name
                except (BrokenPlugin, ImportError) as error:  # of another of that class name
                    warn_once(str(error))
        return None

    def spec(self, plugin: Any) -> dict[str, Any]:
        """The inverse of `build`: name and all options of a plug-in."""
        name = self.name_of(plugin)
        if name is None:
            raise ValueError(f"{plugin!r} is not registered as a {self.kind}; a recipe cannot name it")
        return {"name": name} | {option: plain(getattr(plugin, option)) for option in _fields(plugin)}


PRUNERS: Registry[LocalPruner] = Registry("pruner", "prunekit.plugins.pruner:LocalPruner")
SIGNALS: Registry[Signal] = Registry("signal", "prunekit.plugins.signal:Signal")
ALLOCATORS: Registry[Allocator] = Registry("allocator", "prunekit.plugins.allocator:Allocator")
LEARNERS: Registry[Learner] = Registry("learner", "prunekit.plugins.learner:Learner")
WIDTHS: Registry[Width] = Registry("width", "prunekit.plugins.width:Width")
OBJECTIVES: Registry[Objective] = Registry("objective", "prunekit.plugins.objective:Objective")
FINISHERS: Registry[Finisher] = Registry("finisher", "prunekit.plugins.finisher:Finisher")
METRICS: Registry[Metric] = Registry("metric", "prunekit.space.metrics:Metric")
EXPORTERS: Registry[Exporter] = Registry("exporter", "prunekit.plugins.exporter:Exporter")
ADAPTERS: Registry[ModelAdapter] = Registry("adapter", "prunekit.plugins.adapter:ModelAdapter")  # by config.model_type
ENGINES: Registry[Engine] = Registry("engine", "prunekit.plugins.engine:Engine")
TRACKERS: Registry[Tracker] = Registry("tracker", "prunekit.plugins.tracker:Tracker")
KINDS: tuple[Registry[Any], ...] = (
    PRUNERS, SIGNALS, ALLOCATORS, LEARNERS, WIDTHS, OBJECTIVES, FINISHERS, METRICS, EXPORTERS, ENGINES, TRACKERS,
    ADAPTERS,
)  # fmt: skip


def identify_code(*values: object) -> dict[str, Any]:
    """Say which code of other packages a run goes through, so that it is not gone on with after a change.

    Args:
        values: plain, such as those of a recipe; what they name counts.

    Returns:
        A part of the identity of a run: digests of code, by kind and name of the plug-in; empty where there is none.
    """
    named = set(_texts(values))
    theirs = (entry for registry in KINDS for entry in registry.values() if entry.owner != "prunekit")
    code = {f"{entry.kind} {entry.name}": digest_of(entry.point.value) for entry in theirs if entry.name in named}
    return {"code of plug-ins": code} if code else {}


def _texts(value: object) -> Iterator[str]:
    """All texts in plain values."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | list | tuple):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _texts(item)


def _fields(plugin: Any) -> dict[str, dataclasses.Field[Any]]:
    """The options of a plug-in or of its class, by name."""
    return {field.name: field for field in dataclasses.fields(plugin) if field.init}


def _typed(field: dataclasses.Field[Any], hint: Any, value: Any) -> Any:
    """A recipe's value as the field's type asks for it: plug-ins from specs, tuples from lists, numbers checked."""
    parts, several = get_args(hint), get_origin(hint) is tuple
    for registry in KINDS:
        if registry.contract in (hint, *parts) and not several:
            if isinstance(value, Mapping) and "name" not in value and isinstance(default := _default(field), Mapping):
                value = {**default, **value}
            if isinstance(value, (str, Mapping)):
                return registry.build(value)
            if isinstance(value, registry.contract) or (value is None and NoneType in parts):
                return value
            raise ValueError(f"{field.name} takes {registry.kind}s by name, or {{name: ...}}, not {value!r}")
    if several and isinstance(value, (list, tuple)) and _holds_plugins(hint):
        hints = parts[:1] * len(value) if parts[-1] is ... else parts
        if len(hints) == len(value):
            return tuple(_typed(field, each, item) for each, item in zip(hints, value, strict=True))
        raise ValueError(_refusal(field.name, hint, value))
    try:
        return TypeAdapter(hint).validate_python(value)
    except PydanticSchemaGenerationError:  # a type of the plug-in's own
        return value
    except ValidationError as error:
        raise ValueError(_refusal(field.name, hint, value)) from error


def _refusal(name: str, hint: Any, value: Any) -> str:
    """One sentence for a value that is not of an option's type."""
    if known := words.choices_of(hint):
        return words.no_choice(name, value, known)
    asked = re.sub(r"(?<!whole )(whole number|number)", r"a \1", type_in_words(hint))
    return f"{name} takes {asked}, not {value!r}"


def type_in_words(hint: Any) -> str:
    """What an option of this type takes, in plain words."""
    return words.type_in_words(hint, lambda of: next((each.kind for each in KINDS if each.contract is of), None))


def _holds_plugins(hint: Any) -> bool:
    return any(registry.contract is hint for registry in KINDS) or any(map(_holds_plugins, get_args(hint)))


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
