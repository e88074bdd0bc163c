"""A shared expert beside routed ones, and blocks with a plain MLP between: sites of their own."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from prunekit.calibration.flow import BlockFlow, installed
from prunekit.calibration.gradients import OutputFisher
from prunekit.export.hf import to_transformers
from prunekit.layer.candidates import Candidate
from prunekit.models.adapters.find import adapter_for
from prunekit.models.blocks import entered
from prunekit.models.classes import define
from prunekit.space.forms import GROUPS
from prunekit.space.sites import Site
from prunekit.system.progress import Progress
from prunekit.testing import toy_tokens
from prunekit.testing.models import tiny
from prunekit.testing.routers import exact_softmax

TOKENS = toy_tokens(windows=3, seqlen=8)
ADAPTER = adapter_for("qwen2_moe")


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    """Three blocks, the second with a plain MLP of 16 neurons; shared experts have 7."""
    return tiny("qwen2_moe").requires_grad_(False)


def shared_site(model: PreTrainedModel, block: int = 0) -> Site:
    return next(s for s in ADAPTER.sites(model) if s.block == block and s.name.endswith("mlp.shared_expert.down_proj"))


def kept(model: PreTrainedModel, site: Site, groups: range) -> Candidate:
    own = ADAPTER.linear(ADAPTER.blocks(model)[site.block], site).weight.detach()
    weight, columns = torch.zeros_like(own), site.columns(groups)
    weight[:, columns] = own[:, columns]
    return Candidate(tuple(groups), weight)


def cut(model: PreTrainedModel, count: Callable[[Site], int]) -> PreTrainedModel:
    """The model in which every site keeps its last groups."""
    small = copy.deepcopy(model)
    for site in ADAPTER.sites(model):
        ADAPTER.remove(small, site, kept(model, site, range(site.n_groups - count(site), site.n_groups)))
    return small


@torch.no_grad()
def logits(model: Any) -> Tensor:
    with exact_softmax():
        return model(TOKENS.ids, use_cache=False).logits


@pytest.mark.parametrize(("experts", "last"), [("whole", "mlp.experts"), ("neurons", "mlp.experts.down_proj")])
def test_sites_are_those_of_every_mlp_in_order_of_execution(model: PreTrainedModel, experts: Any, last: str) -> None:
    sites = ADAPTER.sites_of(model, GROUPS, experts=experts)
    attention, routed = "self_attn.o_proj", ["mlp.shared_expert.down_proj", last]
    assert [(site.block, ADAPTER.path(site)) for site in sites] == [
        *((0, path) for path in (attention, *routed)), (1, attention), (1, "mlp.down_proj"),
        *((2, path) for path in (attention, *routed)),
    ]  # fmt: skip
    shared, plain = sites[1], sites[4]
    assert (shared.kind, shared.n_groups, shared.least, shared.parameters(3)) == ("mlp", 7, 1, 3 * 3 * 24)
    assert (plain.kind, plain.n_groups, plain.least) == ("mlp", 16, 0)
    assert sum(site.parameters(site.n_groups) for site in sites) < sum(p.numel() for p in model.parameters())


@torch.no_grad()
def test_the_map_of_a_shared_expert_receives_gated_neurons_and_makes_what_is_added(model: PreTrainedModel) -> None:
    block, site = ADAPTER.blocks(model)[0], shared_site(model)
    hidden, calls = entered(model, ADAPTER, TOKENS.ids)
    plain, seen = calls[0](block, hidden), list[Tensor]()
    moe: Any = block.get_submodule("mlp")
    with moe.register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, 1))):
        calls[0](block, hidden)
    (x,) = seen
    shared, s = moe.shared_expert, torch.sigmoid(moe.shared_expert_gate(seen[0]))
    caught = list[Tensor]()
    with shared.down_proj.register_forward_hook(lambda _, args, out: caught.extend((args[0], out))):
        looked = calls[0](block, hidden)
    received, made = caught
    assert ADAPTER.linear(block, site) is shared.down_proj
    torch.testing.assert_close(received, s * torch.nn.functional.silu(shared.gate_proj(x)) * shared.up_proj(x))
    torch.testing.assert_close(made, s * shared(x), rtol=0, atol=1e-12)
    torch.testing.assert_close(looked, plain, rtol=0, atol=1e-12)
    assert torch.equal(calls[0](block, hidden), plain), "while nobody looks it runs as ever"
    assert not any("forward" in vars(module) or module._forward_pre_hooks for module in block.modules())


@torch.no_grad()
def test_a_masked_shared_expert_is_a_cut_one(model: PreTrainedModel) -> None:
    site = shared_site(model)
    chosen, small = kept(model, site, range(3, 7)), copy.deepcopy(model)
    ADAPTER.remove(small, site, chosen)
    with installed(ADAPTER.linear(ADAPTER.blocks(model)[0], site), site, chosen.weight):
        masked = logits(model)
    torch.testing.assert_close(logits(small), masked, rtol=0, atol=1e-10)
    gates = [
        each.get_submodule("model.layers.0.mlp.shared_expert_gate").get_parameter("weight") for each in (small, model)
    ]
    assert torch.equal(*gates), "which stays"
    with pytest.raises(ValueError, match="a shared expert has one neuron or more"):
        ADAPTER.pruned(ADAPTER.blocks(model)[0], site, kept(model, site, range(0)))


@torch.no_grad()
def test_calibration_goes_on_as_through_the_cut_expert_and_experts_see_what_it_has_lost(model: PreTrainedModel) -> None:
    site, flow = shared_site(model), BlockFlow(model, ADAPTER, TOKENS, dense=True)
    chosen, small = kept(model, site, range(2, 7)), copy.deepcopy(model)
    ADAPTER.remove(small, site, chosen)
    own, lost = ADAPTER.linear(ADAPTER.blocks(model)[0], site).weight, torch.zeros(())
    assert flow.dense is not None
    for each in (one for one in ADAPTER.sites(model) if one.block == 0):
        moments = flow.received(each)
        if each == site:
            lost = flow.stream.inputs[0] @ (chosen.weight - own).T
        if each.kind == "experts":
            torch.testing.assert_close(flow.stream.residual(0) - flow.dense.residual(0), lost, rtol=0, atol=1e-12)
            assert moments.gram.shape == (6, 6)
        flow.carry(each, chosen.weight if each == site else None)
    flow.advance(0)
    hidden, calls = entered(small, ADAPTER, TOKENS.ids)
    torch.testing.assert_close(
        flow.stream.hidden[0], calls[0](ADAPTER.blocks(small)[0], hidden), rtol=0, atol=1e-6
    )  # routers are float32
    assert float((flow.stream.hidden[0] - flow.dense.hidden[0]).abs().max()) > 1e-3


def test_the_output_of_a_shared_expert_costs_what_that_of_the_experts_costs(
    model: PreTrainedModel, tmp_path: Path
) -> None:
    """Both are added to one sum, so they have one Fisher matrix: the gate is in front of what is judged."""
    sites = [site for site in ADAPTER.sites_of(model, GROUPS, experts="neurons") if site.block == 0]
    found = OutputFisher.collected(model, ADAPTER, sites, TOKENS, 0, tmp_path, Progress())
    shared, routed = (found.read(0, ADAPTER.path(site), torch.device("cpu")) for site in sites[1:])
    torch.testing.assert_close(shared, routed, rtol=1e-5, atol=0)
    assert float(shared.diagonal().min()) > 0


# -- files -------------------------------------------------------------------------------------------------


def test_unequal_shared_experts_and_a_dropped_mlp_are_saved_loaded_and_generate(
    model: PreTrainedModel, tmp_path: Path
) -> None:
    counts = {(0, 7): 3, (2, 7): 6, (1, 16): 0, (0, 3): 0, (1, 3): 1, (0, 6): 4}
    small, freed = cut(model, lambda site: counts.get((site.block, site.n_groups), site.n_groups)), 0
    for site in ADAPTER.sites(model):
        count = counts.get((site.block, site.n_groups), site.n_groups)
        freed += site.parameters(site.n_groups) - site.parameters(count)
    exported = to_transformers(small, ADAPTER)
    assert type(exported) is define(ADAPTER.family_of(model.config))[2]  # type: ignore[attr-defined]
    assert torch.equal(logits(exported), logits(small))
    assert model.num_parameters() - exported.num_parameters() == freed
    exported.save_pretrained(tmp_path)
    again: Any = AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation="eager").eval()
    assert torch.equal(logits(again), logits(small))
    layers = [again.config.per_layer_config[index] for index in range(3)]
    assert [list(layer.skip) for layer in layers] == [["attention"], ["mlp"], []]
    assert [layer.shared_expert_intermediate_size for layer in layers][::2] == [3, 6]
    assert [(s.block, s.n_groups) for s in ADAPTER.sites(again)] == [
        (0, 3), (0, 4), (1, 1), (2, 3), (2, 6), (2, 6)
    ], "it can be pruned again"  # fmt: skip
    again.float()  # no cache of zeros holds a mask of float64
    options = {"max_new_tokens": 4, "do_sample": False, "attention_mask": torch.ones_like(TOKENS.ids)}
    plain = again.generate(TOKENS.ids, use_cache=False, pad_token_id=0, **options)
    assert torch.equal(plain, again.generate(TOKENS.ids, pad_token_id=0, **options))
    assert torch.equal(plain, again.generate(TOKENS.ids, pad_token_id=0, cache_implementation="static", **options))


@pytest.mark.parametrize(("family", "experts"), [("qwen2_moe", 7), ("qwen3_moe", 6)])
def test_equal_mlps_of_every_kind_are_of_the_stock_class(family: str, experts: int, tmp_path: Path) -> None:
    adapter, dense = adapter_for(family), tiny(family, mlp_only_layers=[1])
    small = copy.deepcopy(dense)
    for site in adapter.sites(dense):
        if site.n_groups in (experts, 16):  # a shared expert or the experts, and the plain MLP
            adapter.remove(small, site, kept(dense, site, range(site.n_groups // 2)))
    exported = to_transformers(small, adapter)
    assert type(exported) is type(dense)
    assert exported.config.intermediate_size == 8
    exported.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation="eager")
    assert torch.equal(logits(again), logits(small))


def test_where_a_block_is_left_out_the_others_keep_their_kind() -> None:
    """With experts in every second block, and the first block gone, they are in the first and the third of the rest."""
    dense = tiny("qwen2_moe", num_hidden_layers=4, mlp_only_layers=[], decoder_sparse_step=2)
    sites = ADAPTER.sites(dense)
    assert [site.block for site in sites if site.kind == "experts"] == [1, 3]
    small = copy.deepcopy(dense)
    for site in sites:
        if site.block == 0:
            ADAPTER.remove(small, site, kept(dense, site, range(0)))
    exported = to_transformers(small, ADAPTER)
    assert type(exported) is type(dense)
    assert (exported.config.num_hidden_layers, exported.config.mlp_only_layers) == (3, [1])
    torch.testing.assert_close(logits(exported), logits(small), rtol=0, atol=1e-12)


def test_a_config_with_a_shared_expert_without_neurons_is_refused(model: PreTrainedModel) -> None:
    small = to_transformers(
        cut(model, lambda site: max(1, site.n_groups - site.block) if site.n_groups == 7 else site.n_groups), ADAPTER
    )
    values = small.config.to_dict()
    layers = {int(index): dict(entry) for index, entry in values.pop("per_layer_config").items()}
    layers[0] = layers.get(0, {}) | {"shared_expert_intermediate_size": 0}
    with pytest.raises(Exception, match="layer 0: shared_expert_intermediate_size is 0; a shared expert has one"):
        define(ADAPTER.family_of(model.config))[0](**values, per_layer_config=layers)  # type: ignore[attr-defined]
