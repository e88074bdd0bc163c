"""The suites behind the tables of docs/results.md say cells that can be run."""

import re
from pathlib import Path

import pytest

from prunekit.errors import WrongInput
from prunekit.plugins.registry import ALLOCATORS, PRUNERS
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


EVERYTHING = next(file for file in SUITES if file.stem == "everything")
REFUSED = ("distilled", "safety-potential")  # by its base recipe


def left_out(kind: str) -> set[str]:
    """The plug-ins of a kind that the comment of `everything` says are not in it, but for what it says of `uniform`."""
    text = re.sub(r"\n# +", " ", EVERYTHING.read_text("utf-8"))
    said = text.partition(f"{kind}s left out: ")[2].partition(". ")[0]
    return set(re.findall(r"`([\w-]+)`", said)) - {"uniform"}


def test_everything_has_every_pruner_of_groups_and_every_allocator_or_says_why_not() -> None:
    suite = Suite.load(EVERYTHING)
    pruners = {name: PRUNERS.build({"name": name}) for name, entry in PRUNERS.items() if entry.owner == "prunekit"}
    groups = {name for name, pruner in pruners.items() if "groups" in pruner.structures}
    assert groups - {str(spec["name"]) for spec in suite.pruners} == left_out("Pruner")
    allocators = {name for name, entry in ALLOCATORS.items() if entry.owner == "prunekit"}
    assert allocators - {str(spec["name"]) for spec in suite.allocators} == left_out("Allocator")
    for name in REFUSED:
        with pytest.raises(WrongInput, match=r"carry=dense|data\.contrast_dataset"):
            resolve(suite.base().with_overrides({"pruner": name}))
