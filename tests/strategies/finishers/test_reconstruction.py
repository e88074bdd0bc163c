"""Sub-layers come closer to the dense ones on windows nobody trained on, and never further away."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from prunekit.calibration.twin import Twin
from prunekit.testing import toy_supernet, toy_tokens, toy_workpiece
from prunekit_strategies.finishers.least_squares import LeastSquares
from prunekit_strategies.finishers.reconstruction import Reconstruction
from prunekit_strategies.finishers.training import held_out

MANY = toy_tokens(windows=16)
QUICK: dict[str, Any] = {"epochs": 3, "batch_tokens": 48, "rate": 3e-3}


def test_every_sub_layer_ends_at_or_below_its_start_and_most_below():
    piece = toy_workpiece(tokens=MANY)
    errors = Reconstruction(**QUICK).finish(piece)["held_out_errors"]
    assert list(errors) == [site.name for site in piece.sites]
    assert all(after <= before for before, after in errors.values())
    assert sum(after < 0.99 * before for before, after in errors.values()) >= 4


def test_the_reported_error_is_the_one_on_held_out_windows():
    piece = toy_workpiece(tokens=MANY)
    errors = Reconstruction(aim="dense", **QUICK).finish(piece)["held_out_errors"]
    _, judge = held_out(MANY, 0.125)
    for here in Twin(piece, judge):
        y = here.wanted(0, "dense")
        left = (here.made(0) - y).square().sum() / y.square().sum()
        assert float(left) == pytest.approx(errors[here.site.name][1])


def test_only_linear_maps_of_sub_layers_change():
    piece = toy_workpiece(tokens=MANY)
    maps = {id(m.weight) for here in Twin(piece, MANY) for m in here.maps}
    before = {name: p.clone() for name, p in piece.model.named_parameters()}
    Reconstruction(**QUICK).finish(piece)
    for name, parameter in piece.model.named_parameters():
        assert id(parameter) in maps or torch.equal(parameter, before[name]), name


def test_training_a_whole_mlp_beats_the_best_last_linear_map():
    net, left = toy_supernet(), []
    plan = (3, 8, *(s.n_groups for s in net.space.sites[2:]))
    long = Reconstruction(aim="dense", epochs=25, rate=2e-2, patience=25, batch_tokens=999, held_out=0.01)
    for finisher in (LeastSquares(aim="dense", damping=0.0), long):
        piece = toy_workpiece(net, plan=plan, tokens=MANY)
        finisher.finish(piece)
        here = next(h for h in Twin(piece, MANY, tokens=999) if h.site is piece.sites[1])
        left.append(float((here.made(0) - here.wanted(0, "dense")).square().sum()))
    assert left[1] < left[0]


def test_a_rate_that_no_sub_layer_bears_is_found_for_each_and_what_was_gained_is_said(monkeypatch):
    lines = []
    piece = toy_workpiece(tokens=MANY)
    monkeypatch.setattr(piece.progress, "say", lines.append)
    found = replace(Reconstruction(**QUICK), rate=0.1).finish(piece)
    assert found["better"] == sum(after < before for before, after in found["held_out_errors"].values()) >= 4
    assert lines[-1].startswith(f"reconstruction: {found['better']} of {len(piece.sites)} sub-layers came closer")


def test_where_nothing_was_gained_that_is_said(monkeypatch):
    lines = []
    piece = toy_workpiece(tokens=MANY)
    monkeypatch.setattr(piece.progress, "say", lines.append)
    assert replace(Reconstruction(**QUICK), rate=1e4).finish(piece)["better"] == 0
    assert lines[-1] == "reconstruction: none of 6 sub-layers came closer on held-out windows, so nothing was changed"
