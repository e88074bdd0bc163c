"""Moments add up."""

from typing import Any

import pytest
import torch

from prunekit.calibration import moments as sums
from prunekit.calibration.moments import Moments


def filled(x, dense=None, weight: Any = None):
    moments = Moments.empty(x.shape[1], x.device)
    moments.add(x)
    moments.add_influence(x, x.flip(1))
    if dense is not None:
        moments.add_made(dense @ weight.T, x)
    return moments


def test_shards_give_the_moments_of_the_whole():
    generator = torch.Generator().manual_seed(0)
    x, dense = torch.randn(50, 6, generator=generator).double(), torch.randn(50, 6, generator=generator).double()
    weight = torch.randn(3, 6, generator=generator).double()
    whole = filled(x, dense, weight)
    shards = filled(x[:13], dense[:13], weight).merged(filled(x[13:], dense[13:], weight))
    for name in ("tokens", "energy", "influence"):
        assert abs(getattr(whole, name) - getattr(shards, name)) < 1e-9
    for name in ("gram", "cross", "mean", "variance"):
        torch.testing.assert_close(getattr(whole, name), getattr(shards, name))


@pytest.mark.parametrize("width", [1, 7, 8, 33, 64])
def test_half_of_a_symmetric_product_is_made_and_mirrored(width, monkeypatch):
    x = torch.randint(-9, 9, (50, width), generator=torch.Generator().manual_seed(0)).float()  # sums are exact
    monkeypatch.setattr(sums, "VALUES_AT_ONCE", 21)  # some rows of a strip at a time
    moments = filled(x[:20])
    first = moments.gram  # to ask in between changes nothing
    moments.add(x[20:])
    assert torch.equal(first, (x[:20].T @ x[:20]).double() / 20)
    assert torch.equal(moments.gram, (x.T @ x).double() / 50)
    assert [i for strip in sums.strips(width) for i in range(strip.start, strip.stop)] == [*range(width)]


def test_means_take_the_place_of_sums():
    moments = filled(torch.randn(50, 7, generator=torch.Generator().manual_seed(0)))
    gram = moments.gram
    settled = moments.settled()
    assert torch.equal(settled, gram)
    assert settled.data_ptr() == moments.outer.data_ptr()


def test_what_is_asked_for_besides_adds_up_too():
    x = torch.randn(6, 9, 4, generator=torch.Generator().manual_seed(1)).double()  # windows of nine tokens

    def asked(windows):
        moments = filled(windows.flatten(0, 1))
        moments.add_absolute(windows)
        moments.add_fed("up", windows.flatten(0, 1)[:, :2])
        moments.add_relative(windows.flatten(0, 1), 2 * windows.flatten(0, 1))
        return moments

    whole, shards = asked(x), asked(x[:2]).merged(asked(x[2:]))
    for moments in (whole, shards):
        torch.testing.assert_close(moments.absolute, x.abs().mean(1).square().mean(0).sqrt())
        expected = (x.square() / (4 * x.square().sum(-1, keepdim=True))).mean((0, 1))
        torch.testing.assert_close(moments.relative, expected)
        torch.testing.assert_close(moments.fed_power("up"), x[..., :2].square().mean((0, 1)))


def test_half_precision_inputs_are_multiplied_in_float32():
    x = torch.full((1000, 1), 1.0625).bfloat16()
    assert float(filled(x).gram) == 1.0625**2


def test_what_is_not_turned_has_no_influence():
    x = torch.randn(9, 4, generator=torch.Generator().manual_seed(0))
    moments = filled(x)
    assert Moments.empty(4, x.device).influence is None
    moments.turned = 0.0
    moments.add_influence(x, 0.5 * x)
    assert moments.influence == pytest.approx(0, abs=1e-12)
    moments.add_influence(x, -3 * x)
    assert moments.influence == pytest.approx(2)


def test_the_variance_of_a_constant_is_zero():
    assert not filled(torch.full((10, 3), 0.1)).variance.gt(1e-12).any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_product_of_two_half_floats_is_exact_in_float32(dtype):
    # why matrix units may take them as they are: only sums round, as they do in float32
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(4096, generator=generator).to(dtype) for _ in range(2))
    assert torch.equal((x.float() * y.float()).double(), x.double() * y.double())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_moments_of_half_floats_are_those_of_the_same_numbers(dtype):
    x = torch.randn(50, 6, generator=torch.Generator().manual_seed(0)).to(dtype)
    half, same = filled(x), filled(x.double())
    torch.testing.assert_close(half.gram, same.gram, rtol=1e-6, atol=1e-7)
    assert torch.equal(half.mean, same.mean)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_floats_are_multiplied_as_they_are_on_cuda(dtype):
    x = torch.randn(4096, 384, generator=torch.Generator().manual_seed(0)).to(dtype)
    y = torch.randn(4096, 128, generator=torch.Generator().manual_seed(1)).to(dtype)
    made = sums.multiplied(x.cuda(), y.cuda())
    assert made.dtype == torch.float32
    torch.testing.assert_close(made.cpu().double(), x.double().T @ y.double(), rtol=1e-4, atol=1e-2)
