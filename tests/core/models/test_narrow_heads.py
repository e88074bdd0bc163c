"""Narrower values inside heads: exact in every basis, cut out as they are in whole weights, and what is refused."""

from typing import Any

import pytest
import torch

from prunekit.layer.candidates import Candidate, narrow_product
from prunekit.models.adapters.find import adapter_for
from prunekit.models.classes import FAMILIES, NarrowHeads, NarrowValues, define
from prunekit.models.modules import narrowed_heads
from prunekit.plugins.adapter import UnsupportedModel
from prunekit.space.forms import GROUPS, RANKS, Values
from prunekit.testing import tiny

KINDS = ["llama", "qwen2", "gemma2", "olmo2", "stablelm", "opt", "gpt_oss", "lfm2", "qwen2_5_vl"]
IDS = torch.arange(16).reshape(2, 8)


def opened(kind: str) -> tuple[Any, Any]:
    """A tiny model in float64 whose maps have biases that are not zero, and its adapter."""
    model = tiny(kind).double().eval()
    for name, value in model.named_parameters():
        if name.endswith("bias"):
            value.data.normal_(generator=torch.Generator().manual_seed(0))
    return model, adapter_for(model.config.model_type)


@torch.no_grad()
def logits(model, **options):
    return model(IDS, **options).logits


def factors_of(site, width, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return normal(site.d_out, site.form.heads * width), normal(site.form.kv_heads * width, site.n_groups)


@pytest.mark.parametrize("kind", KINDS)
def test_a_head_is_the_same_in_every_basis_and_narrower_ones_are_the_products(kind):
    """The cut model is the dense one with the product in the place of the map behind attention, biases and all."""
    model, adapter = opened(kind)
    dense = logits(model)
    sites: list[Any] = [s for s in adapter.sites_of(model, GROUPS, "narrow") if isinstance(s.form, Values)]
    assert sites
    for site in sites:  # in a basis that is no rotation
        block = adapter.blocks(model)[site.block]
        makes, reads = (block.get_submodule(path) for path in (adapter.values_path(site), adapter.path(site)))
        _, bases = factors_of(site, site.n_groups)
        back = torch.linalg.inv(bases.unflatten(0, (site.form.kv_heads, -1)))  # of every KV head
        heads = reads.weight.detach().unflatten(1, (site.form.kv_heads, -1, site.n_groups))
        left = torch.einsum("oghw,gwv->oghv", heads, back).flatten(1)
        for path, module in zip(
            (adapter.values_path(site), adapter.path(site)), narrowed_heads(makes, reads, left, bases), strict=True
        ):
            block.set_submodule(path, module)
    torch.testing.assert_close(logits(model), dense, rtol=0, atol=1e-9)

    (cut, adapter), (masked, _) = opened(kind), opened(kind)
    before = sum(p.numel() for p in cut.parameters())
    for site in sites:
        factors = factors_of(site, 2, site.block)
        weight = narrow_product(*factors, site.form.heads) / 10
        adapter.remove(cut, site, Candidate(None, weight, (factors[0] / 10, factors[1])))
        adapter.linear(adapter.blocks(masked)[site.block], site).weight.data.copy_(weight)
    torch.testing.assert_close(logits(cut), logits(masked), rtol=0, atol=1e-9)
    freed = sum(site.parameters(site.n_groups) - site.parameters(2) for site in sites)
    assert sum(p.numel() for p in cut.parameters()) == before - freed, "prices are what is freed, to the unit"


def test_what_a_site_costs_is_counted_by_hand_and_nothing_is_counted_twice():
    model, adapter = opened("qwen2")  # biases of queries, keys and values; 6 query heads of 4, 3 KV heads, d = 24
    query, key, values, mlp = adapter.sites_of(model, GROUPS, "narrow")[:4]
    assert [site.kind for site in (query, key, values, mlp)] == ["linear", "linear", "attention", "mlp"]
    assert (query.form, key.form, query.input_group) == (RANKS, RANKS, key.input_group)
    assert values.parameters(3) == 3 * (6 * 24 + 3 * (24 + 1))
    assert [values.least, values.n_groups, values.describe(3)] == [1, 4, "3 of 4 values a head"]
    block = adapter.blocks(model)[0]
    attention = sum(p.numel() for p in block.self_attn.parameters())
    counted = sum(site.parameters(site.n_groups) for site in (query, key, values))
    assert attention - counted == 6 * 4 + 3 * 4, "the biases of queries and keys are outside"


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_attention_and_cache_find_heads_of_one_width(implementation):
    model, adapter = opened("llama")
    for site in adapter.sites_of(model, GROUPS, "narrow"):
        if isinstance(site.form, Values):
            factors = factors_of(site, 1, site.block)
            adapter.remove(model, site, Candidate(None, narrow_product(*factors, site.form.heads), factors))
    model.set_attn_implementation(implementation)
    with torch.no_grad():
        start = model(IDS[:, :5], use_cache=True)
        rest = model(IDS[:, 5:], past_key_values=start.past_key_values, use_cache=True).logits
    torch.testing.assert_close(torch.cat([start.logits, rest], 1), logits(model, use_cache=False), rtol=0, atol=1e-10)


@pytest.mark.parametrize("kind", ["phi3", "gpt_neox", "falcon", "qwen3_next"])
def test_families_whose_values_are_no_map_by_themselves_are_refused_in_a_sentence(kind):
    with pytest.raises(
        UnsupportedModel, match="no linear maps of queries, keys and values by themselves; choose heads"
    ):
        adapter_for(kind).sites_of(tiny(kind), GROUPS, "narrow")


def test_sizes_that_no_layer_can_have_are_refused():
    config, _, causal = define(FAMILIES["llama"])
    sizes = {"num_attention_heads": 6, "num_key_value_heads": 3, "intermediate_size": 5}
    options = {"hidden_size": 24, "num_hidden_layers": 1, "head_dim": 4, "vocab_size": 61}
    with torch.device("meta"):
        block = causal(config(**options, per_layer_config={0: sizes | {"values": 3}})).model.layers[0].self_attn
    assert isinstance(block.v_proj, NarrowValues)
    assert isinstance(block.o_proj, NarrowHeads)
    assert (block.v_proj.narrow.out_features, block.o_proj.narrow.in_features) == (9, 18)
    with pytest.raises(Exception, match="layer 0: values is how many every head has"):
        config(**options, per_layer_config={0: sizes | {"values": -1}})
    with torch.device("meta"), pytest.raises(ValueError, match="values is 5, and every head has 4 at most"):
        causal(config(**options, per_layer_config={0: sizes | {"values": 5}}))
