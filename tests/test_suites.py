"""The suites behind the tables of docs/results.md say cells that can be run."""

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


REFUSED = {"distilled", "safety-potential"}  # by the base recipe of `everything`, which says why
EXPERTS = {"expert-frequency", "reap"}  # the bundled model has none
APART = {"self-pruner", "olica", "minitron"}  # asks a language model, is of narrower heads, is of equal blocks


def test_everything_has_every_pruner_of_groups_and_every_allocator() -> None:
    suite = Suite.load(next(file for file in SUITES if file.stem == "everything"))
    pruners = {name: PRUNERS.build({"name": name}) for name, entry in PRUNERS.items() if entry.owner == "prunekit"}
    groups = {name for name, pruner in pruners.items() if "groups" in pruner.structures}
    assert groups - {str(spec["name"]) for spec in suite.pruners} == REFUSED | EXPERTS
    allocators = {name for name, entry in ALLOCATORS.items() if entry.owner == "prunekit"}
    assert allocators - {str(spec["name"]) for spec in suite.allocators} == APART
    for name in REFUSED:
        with pytest.raises(WrongInput, match=r"carry=dense|data\.contrast_dataset"):
            resolve(suite.base().with_overrides({"pruner": name}))
