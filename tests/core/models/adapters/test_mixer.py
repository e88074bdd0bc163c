"""State space models: what their linear maps receive is seen whatever the mixer does with their weights."""

import importlib
from typing import Any

import pytest
import torch
from torch.nn import functional

from prunekit.calibration.flow import BlockFlow
from prunekit.calibration.gradients import Gradients
from prunekit.calibration.statistics import statistics_of
from prunekit.measure.speed import speed
from prunekit.models.adapters.find import adapter_for
from prunekit.models.blocks import entered
from prunekit.plugins.adapter import UnsupportedModel
from prunekit.space.forms import WEIGHTS, Pattern
from prunekit.system.progress import Progress
from prunekit.testing import tiny, toy_supernet, toy_tokens
from prunekit_strategies.finishers.training import LanguageLoss

FUSED = {"mamba": "mamba_inner_fn", "mamba2": "mamba2_split_conv1d_scan_combined"}  # what trains, where it is installed


@pytest.fixture(params=FUSED)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


def test_sites_are_the_projections_and_their_price_is_that_of_their_weights() -> None:
    found = {
        family: [
            (site.name.removeprefix("backbone.layers.0.mixer."), site.n_groups, site.params_per_group)
            for site in adapter_for(family).linear_sites(tiny(family), WEIGHTS)
            if site.block == 0
        ]
        for family in FUSED
    }
    assert found == {
        "mamba": [("in_proj", 24, 96), ("x_proj", 48, 14), ("dt_proj", 4, 48), ("out_proj", 48, 24)],
        "mamba2": [("in_proj", 24, 120), ("out_proj", 48, 24)],
    }


def test_groups_are_refused_with_what_works_instead(family: str) -> None:
    with pytest.raises(UnsupportedModel, match=f"'{family}' have no groups .*; remove single weights with structure w"):
        adapter_for(family).sites(tiny(family))


def test_rows_that_are_no_whole_blocks_are_named() -> None:
    with pytest.raises(UnsupportedModel, match=r"layers\.0\.mixer\.dt_proj has rows of 4 weights, which are no whole"):
        adapter_for("mamba").linear_sites(tiny("mamba"), Pattern(2, 8))


def test_a_fused_kernel_cannot_pass_by_what_is_caught(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fused(*_: Any, **__: Any) -> None:
        raise AssertionError("the kernel has read the weights")

    stock = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    monkeypatch.setattr(stock, FUSED[family], fused)
    model, adapter, tokens = tiny(family).requires_grad_(False).train(), adapter_for(family), toy_tokens()
    with pytest.raises(AssertionError, match="has read"):
        model(tokens.ids, use_cache=False)  # so it is the kernel's turn without the adapter
    flow = BlockFlow(model, adapter, tokens, dense=True)
    for site in adapter.linear_sites(model, WEIGHTS):
        assert flow.received(site).tokens == tokens.n_tokens
        flow.carry(site, None)
        if adapter.part(site) is not None:
            flow.advance(site.block)
    assert all(module.training for module in model.modules())


def test_a_map_that_nobody_calls_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    model, adapter = tiny("mamba"), adapter_for("mamba")
    flow = BlockFlow(model, adapter, toy_tokens(), dense=False)
    monkeypatch.setattr(type(adapter), "exposed", lambda self, block: torch.no_grad())
    with pytest.raises(UnsupportedModel, match=r"mixer\.dt_proj is never called"):
        flow.received(adapter.linear_sites(model, WEIGHTS)[2])


@torch.no_grad()
def test_time_steps_are_measured_behind_the_projection_that_is_carried() -> None:
    model, adapter, tokens = tiny("mamba"), adapter_for("mamba"), toy_tokens()
    _, x_proj, dt_proj, _ = adapter.linear_sites(model, WEIGHTS)[:4]
    flow = BlockFlow(model, adapter, tokens, dense=False)
    gram = flow.received(x_proj).gram
    weight = model.get_submodule(x_proj.name).get_parameter("weight").detach().clone()
    weight[:, ::2] = 0
    flow.carry(x_proj, weight)
    steps = weight[: dt_proj.d_in]  # the first rows make the time steps, the others B and C
    torch.testing.assert_close(flow.received(dt_proj).gram, steps @ gram @ steps.T)


@pytest.mark.parametrize("half", [False, True], ids=["float64", "bfloat16"])
def test_blocks_exposed_compute_the_same_bits(family: str, half: bool) -> None:
    model, adapter, tokens = tiny(family), adapter_for(family), toy_tokens()
    model = model.bfloat16() if half else model
    hidden, calls = entered(model, adapter, tokens.ids)
    with torch.no_grad():
        for call, block in zip(calls, adapter.blocks(model), strict=True):
            hidden = call(block, hidden)
        assert torch.equal(adapter.logits(model, hidden), model(tokens.ids).logits)


def test_gradients_are_those_of_autograd_through_the_whole_model(family: str, tmp_path: Any) -> None:
    model, adapter, tokens = tiny(family), adapter_for(family), toy_tokens()
    sites = adapter.linear_sites(model, WEIGHTS)
    weights = [model.get_submodule(site.name).get_parameter("weight") for site in sites]
    windows = []
    for window in tokens.ids:
        logits = model(window[None]).logits[0, :-1]
        windows.append(torch.autograd.grad(functional.cross_entropy(logits, window[1:]), weights))
    found = Gradients.collected(model.requires_grad_(False), adapter, tokens, tmp_path, Progress())
    for site, *own in zip(sites, *windows, strict=True):
        gradient, fisher = found.read(site.block, adapter.path(site), torch.device("cpu"))
        expected = torch.stack(own)
        # the mixer itself goes through float32
        torch.testing.assert_close(gradient, expected.mean(0), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(fisher, expected.square().mean(0), rtol=1e-4, atol=1e-6)


def test_a_supernet_computes_what_masked_and_assembled_models_compute(family: str) -> None:
    net, tokens = toy_supernet(family, structure="weights"), toy_tokens()
    plan = net.space.nearest([k + (i % 3 - 1) * 3 for i, k in enumerate(net.space.uniform())])
    seen = torch.cat([part for _, part in net.logits(plan, tokens)])
    with torch.no_grad():
        assembled = net.assemble(plan)
        torch.testing.assert_close(seen, assembled(tokens.ids).logits, rtol=0, atol=1e-6)
        for site, count in zip(net.space.sites, plan, strict=True):
            linear = net.adapter.linear(net.blocks[site.block], site)
            linear.weight.data *= net.store.get(site, count).weight != 0  # this pruner keeps weights as they are
        assert torch.equal(assembled(tokens.ids).logits, net.model(tokens.ids).logits)


def test_a_walk_in_half_precision_keeps_the_residual_stream_in_float32(family: str) -> None:
    model, adapter, tokens = tiny(family).bfloat16(), adapter_for(family), toy_tokens()
    flow = BlockFlow(model, adapter, tokens, dense=True)
    for site in adapter.linear_sites(model, WEIGHTS):
        linear = adapter.linear(adapter.blocks(model)[site.block], site)
        assert bool(torch.isfinite(flow.received(site, statistics_of({"absolute", "relative"})).outer).all())
        flow.carry(site, linear.weight.detach() * 0.9)
        if adapter.part(site) is not None:
            flow.advance(site.block)
            assert flow.stream.hidden[0].dtype == torch.float32


def test_a_teacher_in_half_precision_judges_one_in_float32(family: str) -> None:
    model, dense, ids = tiny(family).float(), tiny(family).bfloat16(), toy_tokens().ids
    with torch.no_grad():
        assert 0 < float(LanguageLoss(model, dense, 0.0, 1.0)(ids)) < 0.1  # rounding alone


def test_speed_is_that_of_decoding_from_the_state(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen = tiny(family), []
    forward = type(model).forward

    def watch(self: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append((kwargs["input_ids"].shape[1], "cache_params" in kwargs))
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(type(model), "forward", watch)
    found = speed(model, prompt=16, new=4, repeats=1)
    assert (found.prompt, found.new) == (16, 4)
    assert seen == 2 * [(16, False), *4 * [(1, True)]]
