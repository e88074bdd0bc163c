"""Weights that are trained beside gates: their slopes, steps and estimates are those of the plain model."""

import copy
from typing import Any

import pytest
import torch

from prunekit.models.adapters.find import adapter_for
from prunekit.plugins.adapter import linear_at
from prunekit.plugins.learner import Decision, GateQuery, Training
from prunekit.search.gated import GatedModel, ranks
from prunekit.space.forms import Pattern
from prunekit.testing import tiny, toy_tokens


def gated(training: Training | None, form: Pattern | None = None, **more: Any) -> GatedModel:
    """A tiny Llama in float64, whose rotary tables and norms round to float32."""
    model = tiny("llama", num_hidden_layers=2, intermediate_size=16).requires_grad_(False).double()
    adapter = adapter_for("llama")
    sites = adapter.sites(model) if form is None else adapter.linear_sites(model, form)
    return GatedModel(model, adapter, sites, toy_tokens(windows=3), training=training, **more)


def ones(net: GatedModel) -> torch.Tensor:
    return torch.ones(net.groups, dtype=torch.float64)


def slopes_of(net: GatedModel, windows: list[int]) -> dict[str, torch.Tensor]:
    """∂loss/∂W of all parameters of the blocks of the dense model, by name, through the plain model."""
    model, ids = copy.deepcopy(net.dense), net.text.ids[windows]
    theta = {f"{i}.{n}": p for i, b in enumerate(net.adapter.blocks(model)) for n, p in b.named_parameters()}
    for p in theta.values():
        p.requires_grad_(True)
    loss = model(ids, labels=ids, use_cache=False).loss  # type: ignore[operator]
    return dict(zip(theta, torch.autograd.grad(loss, list(theta.values())), strict=True))


def values_of(net: GatedModel) -> dict[str, torch.Tensor]:
    return {f"{i}.{n}": p.clone() for i, b in enumerate(net.blocks) for n, p in b.named_parameters()}


def test_a_step_of_sgd_is_the_slope_of_the_plain_model_and_the_answer_is_from_before_it() -> None:
    net = gated(Training(optimizer="sgd", betas=(0.0, 0.0), clip=0.0))
    before, slopes = values_of(net), slopes_of(net, [0, 2])
    loss = net.answer(GateQuery(ones(net), (0, 2))).loss
    assert net.answer(GateQuery(ones(net), (0, 2), rate=0.5)).loss == loss
    after = values_of(net)
    for name, slope in slopes.items():
        torch.testing.assert_close(after[name], before[name] - 0.5 * slope, rtol=1e-5, atol=1e-7)
    assert net.answer(GateQuery(ones(net), (0, 2))).loss < loss
    dense = {f"{i}.{n}": p for i, b in enumerate(net.dense_blocks) for n, p in b.named_parameters()}
    assert all(torch.equal(p, before[name]) for name, p in dense.items()), "the dense model is as it was"
    assert not any(p.requires_grad for p in (*net.dense.parameters(), *net.model.parameters()))


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_steps_are_those_of_torch(optimizer: Any) -> None:
    net = gated(Training(optimizer=optimizer, betas=(0.9, 0.95), decay=0.1, clip=1e-3))
    assert net.weights is not None
    mine = net.weights.parameters
    theirs = [torch.nn.Parameter(p.clone()) for p in mine]
    other = (
        torch.optim.AdamW(theirs, lr=0.1, betas=(0.9, 0.95), weight_decay=0.1)
        if optimizer == "adamw"
        else torch.optim.SGD(theirs, lr=0.1, momentum=0.9, weight_decay=0.1)
    )
    rng = torch.Generator().manual_seed(0)
    for _ in range(3):
        slopes = [torch.randn(p.shape, generator=rng, dtype=p.dtype) for p in mine]
        for p, slope in zip(theirs, slopes, strict=True):
            p.grad = slope.clone()
        torch.nn.utils.clip_grad_norm_(theirs, 1e-3)
        other.step()
        net.weights.step(slopes, 0.1)
    for one, two in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-8)


def test_adapters_tell_the_product_rule_of_their_slopes() -> None:
    training = Training(rank=2, alpha=3.0, optimizer="sgd", betas=(0.0, 0.0), clip=0.0)
    net = gated(training, seed=5)
    assert net.weights is not None
    query = GateQuery(ones(net), (0, 1), frozenset({"lora"}))
    slopes, scale = slopes_of(net, [0, 1]), 1.5

    def told(found: Any) -> torch.Tensor:
        assert found.lora is not None
        return found.lora

    first = told(net.answer(query))  # B is 0: the slope on the rows of A alone
    for site in net.sites:
        cuts = net.adapter.cuts(net.blocks[site.block], site)
        for row, cut in enumerate(cuts, len(first) - len(cuts)):
            linear = linear_at(net.blocks[site.block], cut.path)
            a, _ = net.weights.adapters[linear]
            exact = scale * slopes[f"{site.block}.{cut.path}.weight"] @ a.T @ a
            each = (exact * linear.weight).abs().sum(1 - cut.dim)[cut.index].sum(1)
            torch.testing.assert_close(first[row, net._first[site]], each, rtol=1e-5, atol=1e-9)
    # behind a step B is not 0: g_B A + B g_A - g_B g_A, with g of the plain model whose weights hold s B A
    net.answer(GateQuery(ones(net), (2,), rate=1.0))
    plain = copy.deepcopy(net.dense)
    for linear, (a, b) in net.weights.adapters.items():
        path = next(n for n, m in net.model.named_modules() if m is linear)
        plain.get_submodule(path).get_parameter("weight").add_(scale * b @ a)
    merged = GatedModel(plain, net.adapter, net.sites, net.text)
    slopes, found = slopes_of(merged, [0, 1]), told(net.answer(query))
    site = net.sites[1]
    cut = net.adapter.cuts(net.blocks[0], site)[-1]
    linear = linear_at(net.blocks[0], cut.path)
    (a, b), slope = net.weights.adapters[linear], slopes[f"0.{cut.path}.weight"]
    at_a, at_b = scale * b.T @ slope, scale * slope @ a.T
    estimate = at_b @ a + b @ at_a - at_b @ at_a
    each = (estimate * (linear.weight + scale * b @ a)).abs().sum(0)
    torch.testing.assert_close(found[-1, net._first[site]], each, rtol=1e-5, atol=1e-9)
    assert net.answer(GateQuery(ones(net))).loss == pytest.approx(merged.answer(GateQuery(ones(net))).loss, rel=1e-6)


def test_aligned_is_the_product_of_two_slopes_and_windows_are_its_parts() -> None:
    net = gated(Training())
    reply = net.answer(GateQuery(ones(net), (0, 2), frozenset({"aligned", "windows"}), beside=(1,)))
    one, two = slopes_of(net, [0, 2]), slopes_of(net, [1])
    site = net.sites[1]
    name = f"0.{net.adapter.path(site)}.weight"
    assert reply.aligned is not None
    torch.testing.assert_close(reply.aligned[net._first[site]], (one[name] * two[name]).sum(0), rtol=1e-5, atol=1e-12)
    assert reply.windows is not None
    alone = [net.answer(GateQuery(ones(net), (i,))).loss for i in (0, 2)]
    assert reply.windows.tolist() == pytest.approx(alone, rel=1e-6)
    assert reply.loss == pytest.approx(sum(alone) / 2, rel=1e-6)


def test_what_is_trained_diverges_from_the_dense_model_and_a_state_brings_it_back() -> None:
    net = gated(Training())
    beside, step = GateQuery(ones(net), text=0.0, dense=1.0), GateQuery(ones(net), rate=0.01)
    assert net.answer(beside).loss == pytest.approx(0, abs=1e-9)
    net.answer(step)
    state = {name: tensor.clone() for name, tensor in net.state().items()}
    assert net.answer(beside).loss > 1e-6
    net.answer(step)
    after = net.answer(step).loss
    again = gated(Training())
    again.restore(state)
    again.answer(step)
    assert again.answer(step).loss == after, "to the bit"


def test_gates_of_a_pattern_multiply_the_weights_of_a_rank() -> None:
    net = gated(None, Pattern(2, 4))
    gates = torch.rand(net.groups, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    query = GateQuery(gates, None, frozenset({"gradient"}))
    reply = net.answer(query)
    plain = copy.deepcopy(net.dense)
    for site in net.sites:
        weight = plain.get_submodule(site.name).get_parameter("weight")
        weight.mul_(gates[net._first[site]][ranks(weight, site)])
    assert reply.loss == pytest.approx(
        GatedModel(plain, net.adapter, (), net.text).answer(GateQuery(ones(net)[:0])).loss
    )
    assert reply.gradient is not None
    for g in range(0, net.groups, 9):
        step = torch.zeros_like(gates).index_fill_(0, torch.tensor([g]), 4e-3)
        up, down = (net.answer(GateQuery(gates + s)).loss for s in (step, -step))
        assert float(reply.gradient[g]) == pytest.approx((up - down) / 8e-3, rel=1e-3, abs=1e-4)


def test_ranks_are_by_magnitude_in_a_block_the_left_one_first() -> None:
    net = gated(None, Pattern(2, 4))
    weight = torch.tensor([[1.0, -3.0, 1.0, 2.0, 0.0, 0.0, 5.0, -6.0]])
    assert ranks(weight, net.sites[0]).tolist() == [[2, 0, 3, 1, 2, 3, 1, 0]]


def test_scales_and_adapters_are_part_of_the_weights_in_the_end() -> None:
    net = gated(Training(rank=2))
    net.answer(GateQuery(ones(net), rate=0.05))
    kept = tuple(tuple(range(0, site.n_groups, 2)) for site in net.sites)
    scales = ones(net) / 2
    gates = torch.cat([scales[net._first[s]] * (torch.arange(s.n_groups) % 2 == 0) for s in net.sites])
    masked = net.answer(GateQuery(gates)).loss
    plain = net.trained(Decision(kept, scales))
    own = GatedModel(plain, net.adapter, (), net.text).answer(GateQuery(gates[:0])).loss
    assert own == pytest.approx(masked, rel=1e-6)
    assert not any("forward" in vars(module) for module in plain.modules())


def test_training_that_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="above 0"):
        Training(alpha=0.0)
    with pytest.raises(ValueError, match="betas"):
        Training(betas=(1.0, 0.0))
