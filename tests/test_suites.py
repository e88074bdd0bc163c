"""The suites behind the tables of docs/results.md say cells that can be run."""

from pathlib import Path

import pytest

from prunekit.recipe.resolve import resolve
from prunekit.recipe.suite import Suite

SUITES = sorted((Path(__file__).parents[1] / "benchmarks" / "suites").glob("*.yaml"))


LARGE = ["everything"]  # hundreds of cells


@pytest.mark.parametrize(
    "file", [pytest.param(file, marks=[pytest.mark.slow] * (file.stem in LARGE), id=file.stem) for file in SUITES]
)
def test_every_cell_of_a_suite_is_a_recipe(file: Path) -> None:
    suite = Suite.load(file)
    base = suite.base()
    for cell in suite.every_cell():
        found = cell.under(base, suite.sparsity[0], 0)
        assert resolve(found).recipe.data.calibration_tokens == found.data.calibration_tokens


def test_every_suite_is_named_in_a_document() -> None:
    root = Path(__file__).parents[1]
    text = "".join(file.read_text("utf-8") for file in [root / "README.md", *(root / "docs").rglob("*.md")])
    assert [file.stem for file in SUITES if f"`{file.stem}`" not in text and f"suites/{file.name}" not in text] == []
