"""Functions of released code are run as they are, apart from the rest of their files."""

import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch
import typer

from prunekit.testing import toy_tokens
from prunekit.testing.models import tiny

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


def test_replayed_maps_get_what_they_got_in_the_model(released) -> None:
    model = tiny("llama", num_hidden_layers=2).float()
    tokens = toy_tokens(windows=3, seqlen=5)
    world = released.World(model, tokens, tokens)
    name, seen = "model.layers.1.mlp.down_proj", []
    fake, _ = released.released_weights.replayed(world, (1,))
    (layer,) = fake.model.layers
    layer.mlp.down_proj.register_forward_hook(lambda _, args, out: seen.append((args[0], out)))
    layer(torch.full((1, 1, 1), 2.0), attention_mask=None)
    ((got, made),) = seen
    assert torch.equal(got[0], world.inputs[name].float()[10:15])
    torch.testing.assert_close(made[0], world.maps[name](got[0]))
    layer.mlp.down_proj.weight.data.zero_()
    assert bool(world.maps[name].weight.any()), "the model's own weights are left alone"
    assert {*released.released_weights.weights_of(fake, (1,))} == {n for n in world.maps if ".1." in n}


def test_every_comparison_has_a_row_in_the_results(released) -> None:
    text = (BENCHMARKS.parent / "docs" / "results.md").read_text()
    rows = text.split("## Held against released code")[1].split("\n## ")[0]
    missing = [
        repository for repository, _ in released.METHODS.values() if repository and f"/{repository} " not in rows
    ]
    assert missing == [], "repositories of comparisons without a row"
