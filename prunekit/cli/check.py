"""`prunekit check`: the conformance suite of a plug-in."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from typing import TYPE_CHECKING, Annotated, Any

import typer

from prunekit.cli.completion import one_of, plugin_kinds, plugins
from prunekit.errors import WrongInput, unknown

if TYPE_CHECKING:
    from prunekit.plugins.registry import Registry


def check(
    name: Annotated[
        str,
        typer.Argument(
            metavar="NAME", help="Name of a plug-in, as in `prunekit list`.", autocompletion=one_of(plugins())
        ),
    ],
    kind: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Kind of plug-in, where several share the name, e.g. allocator.",
            autocompletion=one_of(plugin_kinds),
        ),
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="OPTION=VALUE", help="An option of the plug-in. Repeatable."),
    ] = None,
) -> None:
    """Run the conformance suite of its kind on a plug-in."""
    from prunekit.plugins.registry import KINDS
    from prunekit.recipe.overrides import parsed

    asked = [registry for registry in KINDS if kind in (None, registry.kind)]
    if not asked:
        raise WrongInput(unknown("kind of plug-in", str(kind), [registry.kind for registry in KINDS]))
    registry = next((registry for registry in asked if name in registry), None)
    if registry is None:
        raise WrongInput(unknown(kind or "plug-in", name, {n for registry in asked for n in registry}))
    for needed in ("pytest", "hypothesis"):
        if find_spec(needed) is None:
            raise WrongInput(f"the suites need {needed}, which is not installed: pip install 'prunekit[testing]'")
    spec = {"name": name, **dict(map(parsed, set_ or []))}
    registry.build(spec)  # a wrong option is the user's mistake, not the plug-in's
    raise typer.Exit(_run_suite(registry, spec))


def _run_suite(registry: Registry[Any], spec: Mapping[str, Any]) -> int:
    """Run the suite of the kind on a module of three lines, as an author would write it, and return its exit code."""
    import tempfile
    from pathlib import Path

    import pytest

    kind = registry.kind
    module = (
        "import pytest\n"
        'pytest.register_assert_rewrite("prunekit.testing")\n'
        "from prunekit import testing\n"
        "from prunekit.plugins import registry\n\n\n"
        f"class Test{kind.capitalize()}(testing.{kind.capitalize()}Suite):\n"
        f"    plugin = next(r for r in registry.KINDS if r.kind == {kind!r}).build({dict(spec)!r})\n"
    )
    with tempfile.TemporaryDirectory(prefix="prunekit-check-") as folder:
        file = Path(folder) / "test_plugin.py"
        file.write_text(module)
        options = ["-q", "-p", "no:cacheprovider", "--import-mode=importlib", f"--rootdir={folder}"]
        options += ["-o", "verbosity_subtests=0"]  # only those that fail are shown
        options += ["-r", "fEx"]  # and what a plug-in is known to miss
        options += ["-W", "ignore::pytest.PytestAssertRewriteWarning"]  # this process has imported much already
        return int(pytest.main([str(file), *options]))
