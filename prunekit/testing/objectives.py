"""What every objective promises, as a test class: subclass it and set `plugin`."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from functools import cache, partial
from typing import ClassVar

import pytest
import torch

from prunekit.calibration.tokens import TokenBatch
from prunekit.checkpoint import fingerprint
from prunekit.contracts import Objective
from prunekit.errors import WrongInput
from prunekit.sites import Allocation
from prunekit.supernet import Supernet
from prunekit.testing.supernets import toy_questions, toy_supernet, toy_tokens


@cache
def _net() -> Supernet:
    return toy_supernet()


class ObjectiveSuite:
    """Lower is better, the dense model is best, the same question has the same answer, nothing is left changed."""

    plugin: ClassVar[Objective]

    @property
    def tokens(self) -> Callable[..., TokenBatch]:
        """The first kind of toy tokens that the objective does not refuse."""
        for kind in (toy_tokens, partial(toy_tokens, sources=2), toy_questions):
            try:
                self.plugin.check(kind())
            except WrongInput:
                continue
            return kind
        raise AssertionError("the objective refuses text, text of several sources, and questions")

    @property
    def dense(self) -> Allocation:
        return tuple(site.n_groups for site in _net().space.sites)

    @property
    def some(self) -> list[Allocation]:
        space, rng = _net().space, random.Random(0)
        return [space.nearest([rng.random() * s.n_groups for s in space.sites]) for _ in range(4)]

    def test_the_loss_is_a_finite_number(self) -> None:
        for allocation in [self.dense, *self.some]:
            loss = self.plugin.loss(_net(), allocation, self.tokens())
            assert isinstance(loss, float)
            assert math.isfinite(loss)

    def test_nothing_is_better_than_keeping_everything_in_divergence_from_dense(self) -> None:
        # a random model predicts nothing, so only objectives that compare with the dense model are held to it
        dense = self.plugin.loss(_net(), self.dense, self.tokens())
        empty: Allocation = tuple(0 for _ in self.dense)
        if abs(dense) < 1e-6:
            assert all(self.plugin.loss(_net(), a, self.tokens()) > dense for a in [*self.some, empty])

    def test_different_allocations_can_have_different_losses(self) -> None:
        assert len({self.plugin.loss(_net(), a, self.tokens()) for a in [self.dense, *self.some]}) > 1

    def test_the_same_question_has_the_same_answer(self) -> None:
        first, second = ([self.plugin.loss(_net(), a, self.tokens()) for a in self.some] for _ in range(2))
        assert first == second

    def test_asking_together_changes_no_answer(self) -> None:
        net, batch = _net(), self.tokens(seed=1)
        alone = [self.plugin.loss(net, a, batch) for a in self.some]
        net.prefetch(self.some, self.plugin.parts(batch), self.plugin.depths(len(net.blocks)))
        assert [self.plugin.loss(net, a, batch) for a in self.some] == alone

    def test_no_more_is_read_of_the_dense_model_than_was_said(self) -> None:
        asked, dense_top = [0], Supernet.dense_top
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Supernet, "dense_top", lambda net, batch, k: asked.append(k) or dense_top(net, batch, k))
            self.plugin.loss(_net(), self.some[0], self.tokens())
        assert max(asked) <= self.plugin.top()

    def test_one_window_is_enough(self) -> None:
        assert math.isfinite(self.plugin.loss(_net(), self.some[0], self.tokens(1)))

    def test_the_network_and_the_random_state_are_as_before(self) -> None:
        before = fingerprint(_net().model), random.getstate(), torch.get_rng_state().tolist()
        for allocation in self.some:
            self.plugin.loss(_net(), allocation, self.tokens())
        assert (fingerprint(_net().model), random.getstate(), torch.get_rng_state().tolist()) == before
