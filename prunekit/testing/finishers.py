"""What every finisher promises, as a test class: subclass it and set `plugin`."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from functools import cache
from itertools import cycle
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from prunekit.errors import WrongInput
from prunekit.plugins.finisher import Finisher, Workpiece
from prunekit.run.finish import check_finished, shapes
from prunekit.search.supernet import Supernet
from prunekit.space.sites import Allocation
from prunekit.system.checkpoints import Checkpoints
from prunekit.testing.supernets import toy_supernet, toy_workpiece

PLANS: dict[str, Allocation] = {  # groups of attention, of the MLP, of attention, ... in three layers
    "half": (1, 8, 2, 9, 1, 8),
    "sub-layers lost": (0, 9, 2, 0, 0, 0),
    "whole": (3, 17, 3, 17, 3, 17),
}
SHARES: dict[str, tuple[float, ...]] = {  # of single weights, map by map and over again
    "half": (0.5, 0.4, 0.6),
    "sub-layers lost": (0.5, 0.0, 0.8, 1.0, 0.0),
    "whole": (1.0,),
}


class Killed(BaseException):
    """Like SIGKILL, as far as one process can tell."""


class Dying(Checkpoints):
    """Count what is saved; with a last save, die right after it."""

    def __init__(self, directory: Path, last: int = 0) -> None:
        super().__init__(directory)
        self.saved, self.last = 0, last

    def save(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        super().save(name, tensors)
        self.saved += 1
        if self.saved == self.last:
            raise Killed


class FinisherSuite:
    """Every site keeps its groups, weights stay finite, the dense model as it was, and the work can be done again."""

    plugin: ClassVar[Finisher]

    def test_is_a_frozen_dataclass(self) -> None:
        assert dataclasses.is_dataclass(self.plugin)
        assert hash(self.plugin) == hash(dataclasses.replace(self.plugin))  # type: ignore[type-var]

    @pytest.mark.parametrize("plan", PLANS)
    def test_every_site_keeps_its_groups_and_every_weight_is_a_number(self, plan: str) -> None:
        sites, counts = _net("llama", self._structure).space.sites, PLANS[plan]
        if self._structure != "groups":
            counts = tuple(int(share * site.n_groups) for site, share in zip(sites, cycle(SHARES[plan]), strict=False))
        self._finished(self._piece(plan=counts))

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """Single weights and low rank for the finishers that know them; biases are paid for with groups."""
        if "pattern" in metafunc.fixturenames:
            known = {} if self.plugin.adds_biases else {"weights": "weights", "n:m": "2:4", "low-rank": "low-rank"}
            metafunc.parametrize("pattern", [text for units, text in known.items() if units in self.plugin.structures])

    def test_no_linear_map_gets_more_than_its_count(self, pattern: str) -> None:
        self._finished(toy_workpiece(toy_supernet(structure=pattern, intermediate_size=16)))  # checked as in a run

    @pytest.mark.parametrize("model_type", ["opt", "gpt_neox"])
    def test_families_with_biases_and_other_blocks_too(self, model_type: str) -> None:
        piece = self._piece(model_type)
        try:
            self.plugin.check(piece.adapter)
        except WrongInput:
            pytest.skip("it refuses this family before any work")
        self._finished(piece)

    def test_the_same_work_has_the_same_result(self) -> None:
        first, second = (self._finished(self._piece()) for _ in range(2))
        _assert_same(first, second)

    def test_a_work_interrupted_at_any_save_ends_in_the_same_bits(
        self, tmp_path: Path, subtests: pytest.Subtests
    ) -> None:
        counting = Dying(tmp_path / "whole")
        whole = self._finished(self._piece(checkpoints=counting))
        with subtests.test("from scratch"):
            _assert_same(whole, self._finished(self._piece()))
        with subtests.test("from its own end"):
            _assert_same(whole, self._finished(self._piece(checkpoints=Dying(tmp_path / "whole"))))
        for last in range(1, counting.saved + 1):
            with subtests.test(f"after save {last} of {counting.saved}"):
                with pytest.raises(Killed):
                    self._finished(self._piece(checkpoints=Dying(tmp_path / str(last), last)))
                _assert_same(whole, self._finished(self._piece(checkpoints=Dying(tmp_path / str(last)))))

    def test_all_it_needs_is_in_the_piece_and_the_rest_is_left_alone(self) -> None:
        piece = toy_workpiece(toy_supernet(structure=self._structure))
        dense, state = copy.deepcopy(piece.dense.state_dict()), torch.get_rng_state()
        self._finished(piece)
        assert torch.equal(state, torch.get_rng_state()), "the global random state is the caller's"
        _assert_same(dense, piece.dense.state_dict())
        parameters = [*piece.dense.parameters(), *piece.model.parameters()]
        assert not any(p.requires_grad or p.grad is not None for p in parameters)
        for module in (*piece.dense.modules(), *piece.model.modules()):
            assert "forward" not in vars(module)
            assert not any((module.training, module._forward_hooks, module._forward_pre_hooks))

    def test_a_dense_model_in_half_precision_teaches_one_in_float32(self) -> None:
        piece = toy_workpiece(toy_supernet(structure=self._structure))
        for model, dtype in ((piece.dense, torch.bfloat16), (piece.model, torch.float32)):
            for parameter in model.parameters():
                parameter.data = parameter.data.to(dtype)
        assert all(value.dtype == torch.float32 for name, value in self._finished(piece).items() if "weight" in name)

    def test_one_window_is_enough_or_refused_with_a_sentence(self) -> None:
        piece = self._piece()
        try:
            self._finished(dataclasses.replace(piece, tokens=piece.tokens.first(1)))
        except WrongInput as refused:
            if "token" not in str(refused):
                raise

    @property
    def _structure(self) -> str:
        """Groups, or single weights for those that know nothing else."""
        return "groups" if "groups" in self.plugin.structures else "weights"

    def _piece(self, model_type: str = "llama", **changes: Any) -> Workpiece:
        return toy_workpiece(_net(model_type, self._structure), **changes)

    def _finished(self, piece: Workpiece) -> dict[str, Tensor]:
        """All tensors of the small model when it is done, checked as a run checks them."""
        before = shapes(piece.model)
        said = self.plugin.finish(piece)
        assert isinstance(said, dict)
        check_finished(piece, self.plugin, before)
        return piece.model.state_dict()


def _assert_same(one: dict[str, Tensor], two: dict[str, Tensor]) -> None:
    assert one.keys() == two.keys()
    for name, value in one.items():
        assert torch.equal(value, two[name]), name


@cache
def _net(model_type: str, structure: str) -> Supernet:
    return toy_supernet(model_type, structure=structure)
