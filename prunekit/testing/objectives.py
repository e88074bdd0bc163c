"""What every objective promises, as a test class: subclass it and set `plugin`."""

from __future__ import annotations

import inspect
import math
import random
from collections.abc import Callable
from functools import cache, partial
from typing import Any, ClassVar, cast

import torch

from prunekit.data.tokens import TokenBatch
from prunekit.errors import WrongInput
from prunekit.models.opening import fingerprint
from prunekit.plugins.objective import Answers, Objective
from prunekit.search.supernet import Supernet
from prunekit.space.sites import Allocation
from prunekit.testing.supernets import spoken, toy_questions, toy_supernet, toy_tokens


@cache
def _net() -> Supernet:
    return toy_supernet()


class Listening:
    """The protocol of answers and nothing behind it; notes what is asked for."""

    def __init__(self, net: Supernet) -> None:
        self._net = net
        self.top, self.depths, self.digests, self.nats = 0, set[int](), set[str](), False

    def __getattr__(self, name: str) -> Any:
        if name not in vars(Answers):
            raise AttributeError(f"answers have no {name}")
        answer = getattr(self._net, name)
        if not callable(answer):
            return answer

        def noted(*arguments: Any, **options: Any) -> Any:
            asked = inspect.signature(answer).bind(*arguments, **options).arguments
            self.digests |= {asked["batch"].digest} if "batch" in asked else set()
            self.depths |= {*asked.get("depths", ())}
            self.top = max(self.top, asked.get("k", 0))
            self.nats |= name == "site_nats"
            return answer(*arguments, **options)

        return noted


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

    def test_nothing_is_better_than_keeping_everything(self) -> None:
        batch = spoken(_net(), self.tokens())  # by what the dense model says itself
        dense, *others = (self.plugin.loss(_net(), a, batch) for a in [self.dense, *self.some])
        assert min(others) >= dense
        assert self.plugin.loss(_net(), tuple(0 for _ in self.dense), batch) > dense

    def test_different_allocations_can_have_different_losses(self) -> None:
        assert len({self.plugin.loss(_net(), a, self.tokens()) for a in [self.dense, *self.some]}) > 1

    def test_the_same_question_has_the_same_answer(self) -> None:
        first, second = ([self.plugin.loss(_net(), a, self.tokens()) for a in self.some] for _ in range(2))
        assert first == second

    def test_asking_together_changes_no_answer(self) -> None:
        net, batch = _net(), self.tokens(seed=1)
        alone = [self.plugin.loss(net, a, batch) for a in self.some]
        reads = self.plugin.reads(net.depth)
        net.prefetch(self.some, reads.parts(batch), reads.depths)
        assert [self.plugin.loss(net, a, batch) for a in self.some] == alone

    def test_no_more_is_read_than_was_said(self) -> None:
        batch = self.tokens()
        reads, listening = self.plugin.reads(_net().depth), Listening(_net())
        self.plugin.loss(cast("Answers", listening), self.some[0], batch)
        assert listening.top <= reads.top
        assert listening.depths <= {*reads.depths}
        assert listening.nats <= reads.nats
        assert listening.digests <= ({part.digest for part in reads.parts(batch)} if reads.tokens else set())

    def test_one_window_is_enough(self) -> None:
        assert math.isfinite(self.plugin.loss(_net(), self.some[0], self.tokens(1)))

    def test_the_network_and_the_random_state_are_as_before(self) -> None:
        before = fingerprint(_net().model), random.getstate(), torch.get_rng_state().tolist()
        for allocation in self.some:
            self.plugin.loss(_net(), allocation, self.tokens())
        assert (fingerprint(_net().model), random.getstate(), torch.get_rng_state().tolist()) == before
