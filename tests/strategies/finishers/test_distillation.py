"""The small model's predictions come closer to the dense model's; a copy of the dense model has nothing to learn."""

from dataclasses import replace

import pytest
import torch

from prunekit.system.checkpoints import Checkpoints
from prunekit.testing import toy_supernet, toy_tokens, toy_workpiece
from prunekit_strategies.finishers.distillation import Distillation
from prunekit_strategies.finishers.training import LanguageLoss, held_out

MANY = toy_tokens(windows=16)
QUICK = {"epochs": 3, "batch_tokens": 48, "rate": 3e-3}


@pytest.mark.parametrize("scope", ["model", "blocks", "cut"])
def test_the_held_out_divergence_falls_and_only_the_scope_changes(scope):
    piece = toy_workpiece(tokens=MANY)
    before = {name: p.clone() for name, p in piece.model.named_parameters()}
    first, last = Distillation(scope=scope, **QUICK).finish(piece)["held_out_loss"]
    assert last < first
    _, judge = held_out(MANY, 0.125)
    assert LanguageLoss(piece.model, piece.dense, 0.0, 1.0).mean([judge.ids]) == pytest.approx(last)
    changed = {name for name, p in piece.model.named_parameters() if not torch.equal(p, before[name])}
    blocks = {name for name in before if "layers" in name}
    expected = {"model": set(before), "blocks": blocks, "cut": {f"{site.name}.weight" for site in piece.sites}}
    assert changed == expected[scope]


@pytest.mark.parametrize("scope", ["model", "cut"])
def test_zeros_stay_and_all_other_weights_learn(scope):
    piece = toy_workpiece(toy_supernet(structure="weights"), tokens=MANY)
    linears = [piece.adapter.linear(piece.adapter.blocks(piece.model)[site.block], site) for site in piece.sites]
    before = [linear.weight.clone() for linear in linears]
    first, last = Distillation(scope=scope, **QUICK).finish(piece)["held_out_loss"]
    assert last < first
    for old, linear in zip(before, linears, strict=True):
        assert torch.equal(linear.weight != 0, old != 0)
        assert (linear.weight[old != 0] != old[old != 0]).float().mean() > 0.9
        assert not linear.weight._backward_hooks


@pytest.mark.parametrize(("seconds", "steps"), [(0.0, None), (1e-9, None), (None, 0)])
def test_without_time_for_a_step_or_with_none_asked_for_nothing_changes(seconds, steps):
    piece = replace(toy_workpiece(tokens=MANY), seconds=seconds)
    before = {name: p.clone() for name, p in piece.model.named_parameters()}
    found = Distillation(steps=steps, **QUICK).finish(piece)
    assert all(torch.equal(p, before[name]) for name, p in piece.model.named_parameters())
    assert (found["epochs"], found["undone"]) == (0, 0)
    if steps is None:
        again = Distillation(**(QUICK | found["options"])).finish(piece)  # the recipe beside the result
        assert again["options"]["steps"] == 0
    assert "held_out_loss" not in found


def test_with_time_steps_are_taken():
    found = Distillation(**QUICK).finish(replace(toy_workpiece(tokens=MANY), seconds=60.0))
    assert len(found["options"]["steps"]) == found["options"]["epochs"] == found["epochs"] == QUICK["epochs"]
    assert min(found["options"]["steps"]) > 0
    assert found["held_out_loss"][1] < found["held_out_loss"][0]


def test_a_corrected_teacher_has_learnt_the_text_and_is_what_is_learnt_from():
    piece = toy_workpiece(tokens=MANY)
    before = {name: p.clone() for name, p in piece.dense.named_parameters()}
    found = Distillation(correction=2, correction_rate=3e-3, **QUICK).finish(piece)
    first, last = found["teacher_held_out_loss"]
    assert last < first
    _, judge = held_out(MANY, 0.125)
    assert LanguageLoss(piece.dense, None, 1.0, 0.0).mean([judge.ids]) == pytest.approx(first)
    assert all(torch.equal(p, before[name]) for name, p in piece.dense.named_parameters()), "only a copy learns"
    plain = toy_workpiece(tokens=MANY)
    Distillation(**QUICK).finish(plain)
    pairs = zip(piece.model.parameters(), plain.model.parameters(), strict=True)
    assert not all(torch.equal(a, b) for a, b in pairs)


def test_an_interrupted_correction_teaches_the_same(killed_at):
    corrected = Distillation(correction=2, correction_rate=3e-3, **QUICK)
    whole, piece = toy_workpiece(tokens=MANY), toy_workpiece(tokens=MANY)
    corrected.finish(whole)
    with killed_at(Checkpoints, "save", 2, after=True):
        corrected.finish(piece)
    again = replace(toy_workpiece(tokens=MANY), checkpoints=piece.checkpoints)
    corrected.finish(again)
    assert all(torch.equal(a, b) for a, b in zip(again.model.parameters(), whole.model.parameters(), strict=True))


@pytest.mark.parametrize("last", [1, 2, 3, 4])
def test_an_interrupted_training_whose_shares_move_ends_in_the_same_bits(killed_at, tmp_path, last):
    tokens = toy_tokens(windows=16, sources=2)
    moving = Distillation(loading="dynamic", truth=1.0, correction=1, **QUICK)
    whole, piece, again = (
        replace(toy_workpiece(tokens=tokens), checkpoints=Checkpoints(folder))
        for folder in (None, tmp_path, tmp_path)
    )  # fmt: skip
    shares = moving.finish(whole)["shares"]
    assert shares["toy-1"] != 0.5
    with killed_at(Checkpoints, "save", last + 1, after=True):  # behind that of the teacher
        moving.finish(piece)
    assert moving.finish(again)["shares"] == shares
    assert all(torch.equal(a, b) for a, b in zip(again.model.parameters(), whole.model.parameters(), strict=True))


@pytest.mark.parametrize("wrong", [{"correction": -1}, {"correction": 1, "correction_rate": 0.0}])
def test_a_correction_that_cannot_be_is_refused(wrong):
    with pytest.raises(ValueError, match="correction ≥ 0"):
        Distillation(**wrong)
