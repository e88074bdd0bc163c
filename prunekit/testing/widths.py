"""What every width promises."""

import dataclasses
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from prunekit.plugins.width import ResidualStream, Width

QUIRKS = ("plain", "silent channels", "one loud channel", "few directions", "all alike")


def toy_stream(width: int = 12, norms: int = 3, *, quirk: str = "plain", seed: int = 0) -> ResidualStream:
    """Statistics of a residual stream of random tokens.

    Args:
        width: channels.
        norms: that read it.
        quirk: one of `QUIRKS`.
        seed: of the tokens.
    """
    generator = torch.Generator().manual_seed(seed)
    rank = 3 if quirk == "few directions" else width
    scales = torch.linspace(0.2, 2.0, width, dtype=torch.float64)[torch.randperm(width, generator=generator)]
    mixing = torch.randn(rank, width, generator=generator, dtype=torch.float64) * scales
    if quirk == "silent channels":
        mixing[:, ::3] = 0
    if quirk == "one loud channel":
        mixing[:, width // 2] *= 1e4
    gram, absolute = torch.zeros(width, width, dtype=torch.float64), torch.zeros(norms, width, dtype=torch.float64)
    for place in range(norms):
        x = torch.randn(4, 16, rank, generator=generator, dtype=torch.float64) @ mixing
        if quirk == "all alike":
            x = torch.ones(4, 16, width, dtype=torch.float64)
        made = x / x.square().mean(-1, keepdim=True).sqrt()
        gram += made.flatten(0, 1).T @ made.flatten(0, 1) / 64
        absolute[place] = made.abs().mean(1).square().mean(0).sqrt()
    return ResidualStream(absolute, gram)


class WidthSuite:
    """Subclass it, name it Test..., and set `plugin`."""

    plugin: Width

    def answered(self, stream: ResidualStream) -> Tensor:
        """Ask for directions, and check what holds for all."""
        width = stream.absolute.shape[1]
        given = self.plugin.directions(stream if self.plugin.turns else replace(stream, gram=None))
        if not self.plugin.turns:
            assert given.dtype == torch.int64
            assert sorted(given.tolist()) == list(range(width)), "every channel once"
            return given
        assert given.dtype == torch.float64
        assert given.shape == (width, width)
        torch.testing.assert_close(given.T @ given, torch.eye(width, dtype=torch.float64), rtol=0, atol=1e-10)
        return given

    def projector(self, given: Tensor, kept: int) -> Tensor:
        """On the directions that stay, so many of them."""
        basis = given if given.ndim == 2 else torch.eye(len(given), dtype=torch.float64)[:, given]
        return basis[:, :kept] @ basis[:, :kept].T

    def test_is_a_frozen_dataclass_that_takes_a_share_and_a_step(self) -> None:
        assert dataclasses.is_dataclass(self.plugin)
        assert hash(self.plugin) == hash(replace(self.plugin))
        assert replace(self.plugin, share=0.5, step=2).shares == (0.5,)
        assert replace(self.plugin, share=(0.0, 0.5)).shares == (0.0, 0.5)
        assert len(replace(self.plugin, share="auto").shares) > 1
        for wrong in ({"share": 0.0}, {"share": 1.5}, {"share": (0.5,)}, {"share": (0.5, 0.25)}, {"step": 0}):
            with pytest.raises(ValueError, match=r"share|step"):
                replace(self.plugin, **wrong)  # type: ignore[arg-type]

    def test_answers_as_its_contract_says_twice_alike_and_leaves_its_input_alone(
        self, subtests: pytest.Subtests
    ) -> None:
        for quirk in QUIRKS:
            with subtests.test(quirk):
                stream, state = toy_stream(quirk=quirk), torch.get_rng_state()
                assert stream.gram is not None
                before = stream.absolute.clone(), stream.gram.clone()
                assert torch.equal(self.answered(stream), self.answered(toy_stream(quirk=quirk)))
                assert torch.equal(state, torch.get_rng_state()), "the global random state is the caller's"
                assert torch.equal(before[0], stream.absolute)
                assert torch.equal(before[1], stream.gram)

    def test_keeps_the_same_in_another_order_of_the_channels(self) -> None:
        stream = toy_stream()
        assert stream.gram is not None
        order = torch.randperm(12, generator=torch.Generator().manual_seed(1))
        other = ResidualStream(stream.absolute[:, order], stream.gram[order][:, order])
        for kept in (1, 5, 11):
            here, there = (self.projector(self.answered(each), kept) for each in (stream, other))
            torch.testing.assert_close(here[order][:, order], there, rtol=0, atol=1e-8)

    def test_keeps_the_same_in_other_units(self) -> None:
        stream = toy_stream()
        assert stream.gram is not None
        louder = ResidualStream(4 * stream.absolute, 16 * stream.gram)
        for kept in (1, 5, 11):
            here, there = (self.projector(self.answered(each), kept) for each in (stream, louder))
            torch.testing.assert_close(here, there, rtol=0, atol=1e-8)
