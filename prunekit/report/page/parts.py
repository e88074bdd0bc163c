"""What a page says of a folder: a result, a family, a study or a comparison."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from prunekit.errors import WrongInput
from prunekit.report.comparison import ROWS
from prunekit.report.page.comparison import parts_of_comparison
from prunekit.report.page.family import parts_of_family
from prunekit.report.page.part import Part
from prunekit.report.page.result import parts_of_result
from prunekit.report.page.study import TRIALS, parts_of_study
from prunekit.system.files import Damaged

OF: Mapping[
    str, Callable[[Path, str], list[Part]]
] = {  # by the file that only such a folder has, the first that is there
    ROWS: parts_of_comparison,
    TRIALS: parts_of_study,
    "pareto.json": parts_of_family,
    "report.json": parts_of_result,
}


def parts_of(folder: Path, name: str = "run") -> list[Part]:
    """The sections about a folder.

    Args:
        folder: of a result, a family, a study or a comparison.
        name: begins all anchors, which no other folder of the page has.

    Raises:
        WrongInput: it is none of these.
    """
    for file, parts in OF.items():
        if not (folder / file).is_file():
            continue
        try:
            return parts(folder, name)
        except (WrongInput, Damaged):
            raise
        except (KeyError, TypeError, AttributeError, ValueError, IndexError) as error:
            found = f"{type(error).__name__}: {error}"
            raise WrongInput(
                f"{folder} holds a report that this version cannot read ({found}); make it again"
            ) from error
    raise WrongInput(f"{folder} is no result, family, study or comparison; give a folder that has {', '.join(OF)}")
