"""Functions of released code are run as they are, apart from the rest of their files."""

import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch
import typer

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
CODE = """
import a_trainer_that_nobody_has

device = "cuda:0"

def doubled(x):
    return x.to("cuda:0") * factor

def never():
    a_trainer_that_nobody_has.train()
"""


@pytest.fixture
def released(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    module = import_module("released")
    yield module
    for name in [name for name in sys.modules if name == "released" or name.startswith("released_")]:
        del sys.modules[name]


def test_a_function_runs_without_what_its_file_imports(released, tmp_path: Path) -> None:
    file = tmp_path / "prune.py"
    file.write_text(CODE)
    taken = released.taken(file, "doubled", changes={"cuda:0": "cpu"}, factor=2)
    assert torch.equal(taken.doubled(torch.ones(2)), torch.full((2,), 2.0))
    assert not hasattr(taken, "never")


def test_a_function_that_is_no_longer_there_is_missed_by_name(released, tmp_path: Path) -> None:
    (tmp_path / "prune.py").write_text(CODE)
    with pytest.raises(typer.BadParameter, match="has no halved; clone the repository anew"):
        released.taken(tmp_path / "prune.py", "halved")
