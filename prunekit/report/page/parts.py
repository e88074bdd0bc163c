"""What a page says of a folder: a result, a family, a study or a comparison."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from prunekit.errors import WrongInput
from prunekit.report.comparison import ROWS
from prunekit.report.page.comparison import parts_of_comparison
from prunekit.report.page.family import parts_of_family
from prunekit.report.page.part import Part
from prunekit.report.page.result import parts_of_result
from prunekit.report.page.study import TRIALS, parts_of_study
from prunekit.system.files import Damaged

KINDS: Mapping[str, str] = {  # by the file that only such a folder has; the first that is there says
    ROWS: "comparison",
    TRIALS: "study",
    "pareto.json": "family",
    "report.json": "result",
}
OF: Mapping[str, Callable[[Path, str], list[Part]]] = {
    "comparison": parts_of_comparison,
    "study": parts_of_study,
    "family": parts_of_family,
    "result": parts_of_result,
}


def kind_of(folder: Path) -> str:
    """What a folder holds: comparison, study, family or result.

    Raises:
        WrongInput: it is none of these.
    """
    for file, kind in KINDS.items():
        if (folder / file).is_file():
            return kind
    if not folder.exists():
        raise WrongInput(
            f"there is no folder {str(folder)!r}; give that of a result, a family, a study or a comparison"
        )
    files = f"{', '.join(list(KINDS)[:-1])} or {list(KINDS)[-1]}"
    raise WrongInput(f"{folder} is no result, family, study or comparison; give a folder that has {files}")


def parts_of(folder: Path, name: str = "run") -> list[Part]:
    """The sections about a folder.

    Args:
        folder: of a result, a family, a study or a comparison.
        name: begins all anchors, which no other folder of the page has.

    Raises:
        WrongInput: it is none of these.
    """
    with readable(folder):
        return OF[kind_of(folder)](folder, name)


@contextmanager
def readable(folder: Path) -> Iterator[None]:
    """Within, what a folder's files do not say is one sentence.

    Raises:
        WrongInput: they are of another version, or were changed.
    """
    try:
        yield
    except (WrongInput, Damaged):
        raise
    except (KeyError, TypeError, AttributeError, ValueError, IndexError) as error:
        found = f"{type(error).__name__}: {error}"
        raise WrongInput(f"{folder} holds a report that this version cannot read ({found}); make it again") from error
