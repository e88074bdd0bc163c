"""Moments add up."""

import pytest
import torch
from torch import nn

from prunekit.calibration import moments as sums
from prunekit.calibration.moments import GRAM, Moments, collected
from prunekit.calibration.statistics import statistics_of
from prunekit.layer.statistics import MapShape, Received, Statistic
from prunekit.testing.statistics import Peak


def map_of(weight):
    linear = nn.Linear(*weight.T.shape, bias=False)
    linear.weight = nn.Parameter(weight, requires_grad=False)
    return linear


def filled(x, *needs, dense=None, residual=None, weight=None):
    """Of some windows, (windows, length, d), or of tokens."""
    weight = torch.eye(x.shape[-1], dtype=x.dtype) if weight is None else weight
    linear, shape = map_of(weight), MapShape(x.shape[-1], len(weight))
    moments = Moments.empty(collected(statistics_of(needs), residual=True), shape, x.device, {"up": MapShape(2, 4)})
    beside = None if dense is None else Received(lambda: dense, linear)
    stream = None if residual is None else lambda: residual
    moments.add(Received(lambda: x, linear, x.shape[-2], stream, beside))
    moments.add_producer("up", Received(lambda: x[..., :2]))
    return moments


def test_shards_give_the_moments_of_the_whole():
    generator = torch.Generator().manual_seed(0)
    x, dense, residual = (torch.randn(6, 9, 4, generator=generator).double() for _ in range(3))
    weight = torch.randn(4, 4, generator=generator).double()
    needs = ("cross", "mean", "variance", "absolute", "relative", "influence", "power", Peak())

    def of(windows: slice) -> Moments:
        return filled(x[windows], *needs, dense=dense[windows], residual=residual[windows], weight=weight)

    whole, shards = of(slice(None)), of(slice(2)).merged(of(slice(2, None)))
    tokens, y = x.flatten(0, 1), dense.flatten(0, 1) @ weight.T
    made = tokens @ weight.T
    for moments in (whole, shards.to(torch.device("cpu"))):
        assert moments.tokens == 54
        torch.testing.assert_close(moments.gram, tokens.T @ tokens / 54)
        values = moments.values(weight)
        assert {*values} == {"cross", "energy", "mean", "variance", "absolute", "relative", "influence", "peak"}
        torch.testing.assert_close(values["cross"], y.T @ tokens / 54)
        torch.testing.assert_close(values["energy"], y.square().sum() / 54)
        torch.testing.assert_close(values["mean"], tokens.mean(0))
        torch.testing.assert_close(values["variance"], tokens.var(0, correction=0))
        torch.testing.assert_close(values["absolute"], x.abs().mean(1).square().mean(0).sqrt())
        torch.testing.assert_close(values["relative"], (tokens.square() / made.square().sum(1, keepdim=True)).mean(0))
        assert torch.equal(values["peak"], tokens.abs().amax(0))
        before = residual.flatten(0, 1)
        turn = 1 - torch.cosine_similarity(before, before + made).mean()
        torch.testing.assert_close(values["influence"], turn)
        torch.testing.assert_close(moments.values(weight[:, :2], "up"), {"power": tokens[:, :2].square().mean(0)})


@pytest.mark.parametrize("width", [1, 7, 8, 33, 64])
def test_half_of_a_symmetric_product_is_made_and_mirrored(width, monkeypatch):
    x = torch.randint(-9, 9, (50, width), generator=torch.Generator().manual_seed(0)).float()  # sums are exact
    monkeypatch.setattr(sums, "VALUES_AT_ONCE", 21)  # some rows of a strip at a time
    moments = filled(x[:20])
    first = moments.gram  # to ask in between changes nothing
    moments.add(Received(lambda: x[20:]))
    assert torch.equal(first, (x[:20].T @ x[:20]).double() / 20)
    assert torch.equal(moments.gram, (x.T @ x).double() / 50)
    assert [i for strip in sums.strips(width) for i in range(strip.start, strip.stop)] == [*range(width)]


def test_means_take_the_place_of_sums():
    moments = filled(torch.randn(50, 7, generator=torch.Generator().manual_seed(0)))
    gram = moments.gram
    settled = moments.settled()
    assert torch.equal(settled, gram)
    assert settled.data_ptr() == moments.outer.data_ptr()


def test_another_map_of_the_same_input_adds_up_what_is_its_own_only():
    x = torch.randn(50, 3, generator=torch.Generator().manual_seed(0)).double()
    one, other = torch.eye(3).double(), torch.tensor([[1.0, 2.0, 3.0]]).double()
    first = filled(x, "relative", "mean", weight=one)
    second = first.of_map(MapShape(3, 1, shared=True), [Received(lambda: x, map_of(other))])
    assert second.outer is first.outer
    assert second.sums["mean", ""] is first.sums["mean", ""]
    torch.testing.assert_close(second.values(other), filled(x, "relative", "mean", weight=other).values(other))
    torch.testing.assert_close(first.values(one), filled(x, "relative", "mean", weight=one).values(one))


def test_half_precision_inputs_are_multiplied_in_float32():
    x = torch.full((1000, 1), 1.0625).bfloat16()
    assert float(filled(x).gram) == 1.0625**2


@pytest.mark.parametrize(("factor", "turn"), [(0.5, 0.0), (-3.0, 2.0)])
def test_what_is_not_turned_has_no_influence(factor, turn):
    x = torch.randn(9, 4, generator=torch.Generator().manual_seed(0))
    moments = filled(factor * x, "influence", residual=x)
    assert float(moments.values(torch.eye(4))["influence"]) == pytest.approx(turn, abs=1e-12)


def test_the_variance_of_a_constant_is_zero():
    assert not filled(torch.full((10, 3), 0.1), "variance").values(torch.eye(3))["variance"].gt(1e-12).any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_moments_of_half_floats_are_those_of_the_same_numbers(dtype):
    x = torch.randn(50, 6, generator=torch.Generator().manual_seed(0)).to(dtype)
    half, same = filled(x, "mean"), filled(x.double(), "mean")
    torch.testing.assert_close(half.gram, same.gram, rtol=1e-6, atol=1e-7)
    assert torch.equal(half.values(torch.eye(6))["mean"], same.values(torch.eye(6))["mean"])


def test_what_sees_the_residual_stream_is_there_where_there_is_one():
    statistics = statistics_of({"influence", "mean"})
    assert [each.name for each in collected(statistics, residual=True)] == ["gram", "influence", "mean"]
    assert [each.name for each in collected(statistics, residual=False)] == ["gram", "mean"]
    assert issubclass(type(GRAM), Statistic)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_floats_are_multiplied_as_they_are_on_cuda(dtype):
    x = torch.randn(4096, 384, generator=torch.Generator().manual_seed(0)).to(dtype)
    y = torch.randn(4096, 128, generator=torch.Generator().manual_seed(1)).to(dtype)
    made = sums.multiplied(x.cuda(), y.cuda())
    assert made.dtype == torch.float32
    torch.testing.assert_close(made.cpu().double(), x.double().T @ y.double(), rtol=1e-4, atol=1e-2)
