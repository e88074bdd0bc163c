"""`prunekit completion`: what a shell needs to complete commands, options and names; and where the names come from."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from typing import Annotated

import typer

from prunekit.errors import WrongInput, unknown

SHELLS = ("bash", "zsh", "fish")
VARIABLE = "_PRUNEKIT_COMPLETE"  # in the environment, where a shell asks

Complete = Callable[[str], list[str]]
"""What is typed so far -> what it may become."""


def prepare() -> None:
    """Let Typer answer shells in the words of its own scripts, where it is a shell that asks."""
    if VARIABLE in os.environ:
        from typer import completion as typers

        typers.completion_init()  # pyright: ignore[reportPrivateImportUsage]  # else done for its own option alone


def completion(
    shell: Annotated[
        str,
        typer.Argument(
            metavar="SHELL", help="bash, zsh or fish.", show_default=False, autocompletion=lambda: list(SHELLS)
        ),
    ],
) -> None:
    """Print a script that lets a shell complete commands, options and names of plug-ins."""
    from typer import completion as typers

    if shell not in SHELLS:
        raise WrongInput(unknown("script for shell", shell, SHELLS))
    typer.echo(
        typers.get_completion_script(  # pyright: ignore[reportPrivateImportUsage]
            prog_name="prunekit", complete_var=VARIABLE, shell=shell
        )
    )


def one_of(find: Callable[[], Iterable[str]]) -> Complete:
    """Complete one name.

    Args:
        find: what there is; asked only when a shell asks.
    """

    def complete(incomplete: str) -> list[str]:
        return sorted(name for name in set(find()) if name.startswith(incomplete))

    return complete


def several_of(find: Callable[[], Iterable[str]]) -> Complete:
    """Complete the last of several names by comma, each of them once."""

    def complete(incomplete: str) -> list[str]:
        front, comma, last = incomplete.rpartition(",")
        given = set(front.split(","))
        return [f"{front}{comma}{name}" for name in one_of(find)(last) if name not in given]

    return complete


def plugins(*kinds: str) -> Callable[[], Iterable[str]]:
    """Names of plug-ins of some kinds; of all without."""

    def find() -> Sequence[str]:
        from prunekit.plugins.registry import KINDS

        return [name for registry in KINDS if not kinds or registry.kind in kinds for name in registry]

    return find


def plugin_kinds() -> Sequence[str]:
    """Kinds of plug-ins."""
    from prunekit.plugins.registry import KINDS

    return [registry.kind for registry in KINDS]


def files_of(group: str) -> Callable[[], Iterable[str]]:
    """Names of presets.

    Args:
        group: of entry points.
    """

    def find() -> Iterable[str]:
        from prunekit.recipe.presets import presets

        return presets(group)

    return find


RECIPES, SPACES = files_of("prunekit.recipes"), files_of("prunekit.spaces")


def listed() -> Sequence[str]:
    """All that `prunekit list` can describe."""
    return [*plugins()(), *RECIPES(), *SPACES()]
