"""What a result is verified with, what it took, and which passes it may share."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import prunekit
from prunekit import Recipe, resolve
from prunekit.errors import CannotGoOn
from prunekit.plugins.dense import Dense
from prunekit.run.clock import Clock
from prunekit.run.results import Result, make_probe
from prunekit.run.stages import Run
from prunekit.search.ledger import Ledger
from prunekit.search.teacher import Teacher
from prunekit.system.files import changed, others
from prunekit.system.progress import Progress
from prunekit.testing import tiny, toy_supernet, toy_tokens


def test_an_export_is_verified_in_float32_whatever_it_is_stored_in() -> None:
    model, tokens = tiny("llama").bfloat16(), toy_tokens(windows=2)
    ids, logits = make_probe(model, tokens)
    assert torch.equal(ids, tokens.ids)
    assert torch.equal(logits, model.float()(tokens.ids, use_cache=False).logits)
    assert logits.dtype == torch.float32


def test_what_is_shared_counts_for_everybody() -> None:
    shared = Clock()
    one, other = Clock(shared), Clock(shared)
    for clock, seconds in ((shared, 4.0), (one, 2.0), (one, 1.0)):
        clock.add("prune", seconds)
    other.add("search", 0.5)
    assert one.seconds == {"prune": 7.0}
    assert other.seconds == {"prune": 4.0, "search": 0.5}
    assert shared.seconds == {"prune": 4.0}


@pytest.mark.parametrize("carry", ["dense", "centre", "expected"])
def test_passes_around_other_centres_are_others_where_activations_follow_them(carry: str, tmp_path: Path) -> None:
    net = toy_supernet()
    text: Any = SimpleNamespace(calibration=toy_tokens(), contrast=None)
    recipe = {"pruner": "wanda", "allocator": "uniform", "objective": "expected-error", "carry": carry}
    recipe |= {"rebuild": False}  # else prices are enough, and candidates are made at the centre alone
    dense, clock = Dense(net.model, None, net.adapter, torch.float64, "toy", ""), Clock()
    run = Run(
        resolve(Recipe.of_mapping(recipe)), dense, net.space, text, Ledger(tmp_path / "ledger"), tmp_path, tmp_path,
        Progress(), clock, Teacher(), 1 << 30, None,
    )  # fmt: skip
    here = net.space.uniform()
    centres = (here, next(net.space.swaps(here)))
    one, other = (run.calibrate(net.space, centre, "prune", clock, search=True) for centre in centres)
    follows = carry == "centre"
    assert (one.store.directory != other.store.directory, one.errors != other.errors) == (follows, follows)


@pytest.mark.parametrize("blocks", [None, 0])
def test_a_loaded_result_is_saved_byte_for_byte_or_not_at_all(
    saved_tiny: Any, quick: Any, tmp_path: Path, blocks: int | None
) -> None:
    out, copy = tmp_path / "out", tmp_path / "copy"
    prunekit.prune(saved_tiny(), output=out, verify=False, **quick())
    (out / "notes.txt").write_text("mine")
    assert Result.load(out, blocks=blocks).save(copy) == copy
    assert (changed(copy), others(copy)) == ([], [])
    names = sorted(path.relative_to(copy) for path in copy.rglob("*") if path.is_file())
    assert all((out / name).read_bytes() == (copy / name).read_bytes() for name in names)
    assert len(names) == len([path for path in out.rglob("*") if path.is_file()]) - 1  # all but the notes

    loaded = Result.load(out, blocks=blocks)
    damaged = bytearray((out / "model.safetensors").read_bytes())
    damaged[-1] ^= 1
    (out / "model.safetensors").write_bytes(damaged)
    for result in (loaded, Result.load(out)):
        with pytest.raises(CannotGoOn, match=r"out/model\.safetensors is not what was written when"):
            result.save(tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_a_loaded_model_that_was_changed_is_what_is_saved(saved_tiny: Any, quick: Any, tmp_path: Path) -> None:
    prunekit.prune(saved_tiny(), output=tmp_path / "out", verify=False, **quick())
    loaded = Result.load(tmp_path / "out")
    with torch.no_grad():
        loaded.model.lm_head.weight.mul_(2)
    replace(loaded, recipe=loaded.recipe.with_overrides({"verify": True})).save(tmp_path / "doubled")
    assert torch.equal(Result.load(tmp_path / "doubled").model.lm_head.weight, loaded.model.lm_head.weight)
