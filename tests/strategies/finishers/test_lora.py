"""What comes out is the small model plus corrections of the rank that was asked, in its own linear maps."""

import pytest
import torch
from torch import nn

from prunekit import TokenBatch
from prunekit.testing import toy_workpiece

pytest.importorskip("peft")

from prunekit_strategies.finishers.lora import LoRA
from prunekit_strategies.finishers.training import LanguageLoss, held_out

MANY = TokenBatch(3 + torch.arange(16 * 12).reshape(16, 12) % 7, "a text that can be learned")
QUICK = {"epochs": 3, "batch_tokens": 48, "rate": 1e-2}


@pytest.mark.parametrize("rank", [1, 3])
def test_changes_are_of_the_rank_asked_and_in_all_linear_maps_of_blocks(rank):
    piece = toy_workpiece(tokens=MANY)
    before = {name: p.clone() for name, p in piece.model.named_parameters()}
    kinds = {name: type(module) for name, module in piece.model.named_modules()}
    first, last = LoRA(rank=rank, **QUICK).finish(piece)["held_out_loss"]
    assert last < first
    assert {name: type(module) for name, module in piece.model.named_modules()} == kinds
    assert not hasattr(piece.model, "peft_config")
    linear = {f"{n}.weight" for n, m in piece.model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"}
    for name, parameter in piece.model.named_parameters():
        moved = parameter - before[name]
        assert bool(moved.any()) == (name in linear), name
        if moved.any():
            assert int(torch.linalg.matrix_rank(moved, rtol=1e-10)) == rank


def test_the_merged_model_has_the_loss_that_is_reported():
    piece = toy_workpiece(tokens=MANY)
    _, last = LoRA(rank=2, teacher=0.5, **QUICK).finish(piece)["held_out_loss"]
    _, judge = held_out(MANY, 0.125)
    assert LanguageLoss(piece.model, piece.dense, 1.0, 0.5).mean([judge.ids]) == pytest.approx(last)


def test_another_seed_is_another_correction():
    ends = []
    for seed in (0, 1):
        piece = toy_workpiece(tokens=MANY, seed=seed)
        LoRA(rank=2, **QUICK).finish(piece)
        ends.append(piece.model.state_dict())
    assert any(not torch.equal(value, ends[1][name]) for name, value in ends[0].items())
