"""What every finisher promises, as a test class: subclass it and set `plugin`."""

from __future__ import annotations

from typing import ClassVar

import torch

from prunekit.contracts import Finisher
from prunekit.testing.supernets import toy_supernet, toy_tokens


class FinisherSuite:
    """The model keeps every shape, stays finite, and the same work gives the same weights."""

    plugin: ClassVar[Finisher]

    def _finished(self) -> dict[str, torch.Tensor]:
        net = toy_supernet()
        plan = net.space.uniform()
        small = net.assemble(plan)
        self.shapes = {name: value.shape for name, value in small.state_dict().items()}
        self.plugin.finish(small, plan, toy_tokens())
        return small.state_dict()

    def test_every_site_keeps_its_count(self) -> None:
        finished = self._finished()
        assert {name: value.shape for name, value in finished.items()} == self.shapes

    def test_the_weights_are_finite_and_the_same_every_time(self) -> None:
        first, second = self._finished(), self._finished()
        assert all(torch.isfinite(value).all() and torch.equal(value, second[name]) for name, value in first.items())
