"""What every family's adapter promises: a cut model computes what the masked dense model computes."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterable
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from prunekit.layer.candidates import Candidate
from prunekit.models.adapters.find import adapter_for
from prunekit.models.adapters.transformer import Transformer
from prunekit.models.modules import grafted
from prunekit.plugins.adapter import Heads, ModelAdapter, UnsupportedModel
from prunekit.plugins.registry import ADAPTERS
from prunekit.space.sites import Site
from prunekit.testing import AdapterSuite
from prunekit.testing.models import SIZES, tiny

RW = {"multi_query": False, "parallel_attn": False, "alibi": True}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    **{model_type: (model_type, {}) for model_type in SIZES},
    "llama-biased": ("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    "llama-one-kv-head": ("llama", {"num_key_value_heads": 1}),
    "llama-every-head-its-own": ("llama", {"num_key_value_heads": 6}),
    "llama-wide-heads": ("llama", {"head_dim": 10}),
    "mistral-sliding": ("mistral", {"sliding_window": 4}),
    "qwen2-sliding": ("qwen2", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}),
    "qwen3-biased": ("qwen3", {"attention_bias": True, "tie_word_embeddings": True}),
    "opt-norms-after": ("opt", {"do_layer_norm_before": False}),
    "opt-narrow-embeddings": ("opt", {"word_embed_proj_dim": 10}),
    "opt-bare": ("opt", {"enable_bias": False, "layer_norm_elementwise_affine": False}),
    "gpt_neox-sequential": ("gpt_neox", {"use_parallel_residual": False}),
    "cohere-norms-by-head": ("cohere", {"use_qk_norm": True, "attention_bias": True}),
    "stablelm-parallel": ("stablelm", {"use_parallel_residual": True, "qk_layernorm": True}),
    "falcon-7b": ("falcon", {"new_decoder_architecture": False, "num_kv_heads": None, "bias": False}),
    "falcon-alibi": ("falcon", {"new_decoder_architecture": False, "num_kv_heads": 6, **RW}),
    "gpt_neox-bare": ("gpt_neox", {"attention_bias": False, "tie_word_embeddings": True}),
}
SLOW = {"falcon-alibi", "stablelm-parallel"}  # what is special in them is as in others


def marked(names: Iterable[str]) -> list[Any]:
    return [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in names]


IDS = torch.tensor([[3, 14, 15, 9, 26, 5, 35, 8, 58], [2, 7, 18, 28, 18, 28, 45, 9, 4]])

Plan = dict[Site, Candidate]


@pytest.mark.parametrize("name", marked([*ADAPTERS, *sorted(VARIANTS.keys() - SIZES.keys())]))
class TestEveryAdapter(AdapterSuite):
    @pytest.fixture(autouse=True)
    def _plugin(self, name: str) -> None:
        self.variant = VARIANTS.get(name, (name, {}))
        type(self).plugin = adapter_for(self.variant[0])

    @pytest.fixture
    def model(self) -> PreTrainedModel:
        return self.plugin.opened(tiny(self.variant[0], **self.variant[1])).requires_grad_(False)


@pytest.fixture(params=marked(VARIANTS))
def case(request: pytest.FixtureRequest) -> tuple[PreTrainedModel, ModelAdapter]:
    model_type, overrides = VARIANTS[request.param]
    return tiny(model_type, **overrides), adapter_for(model_type)


def candidate(model: nn.Module, adapter: ModelAdapter, site: Site, groups: list[int], scale: float = 1.1) -> Candidate:
    """Keeps `groups`, with weights that are not the dense ones."""
    weight = torch.zeros_like(adapter.linear(adapter.blocks(model)[site.block], site).weight)
    columns = site.columns(sorted(groups))
    weight[:, columns] = adapter.linear(adapter.blocks(model)[site.block], site).weight.detach()[:, columns] * scale
    return Candidate(tuple(sorted(groups)), weight)


def drawn(model: nn.Module, adapter: ModelAdapter, sites: tuple[Site, ...], seed: int = 0) -> Plan:
    """A random uneven plan without dropped parts; the first attention keeps one group, the first MLP one neuron."""
    rng, plan = random.Random(seed), {}
    for i, site in enumerate(sites):
        count = 1 if i < 2 else rng.randint(1, site.n_groups)
        plan[site] = candidate(model, adapter, site, rng.sample(range(site.n_groups), count))
    return plan


def dropping(model: nn.Module, adapter: ModelAdapter, *gone: tuple[int, str]) -> Plan:
    """Drop the parts (block, kind), keep everything else as it is."""
    return {
        s: candidate(model, adapter, s, [] if (s.block, s.kind) in gone else list(range(s.n_groups)), scale=1.0)
        for s in adapter.sites(model)
    }


def masked(model: PreTrainedModel, adapter: ModelAdapter, plan: Plan) -> PreTrainedModel:
    """The dense model with the candidates' weights; a part that keeps nothing answers zeros."""
    twin = copy.deepcopy(model)
    for site, chosen in plan.items():
        block = adapter.blocks(twin)[site.block]
        linear = adapter.linear(block, site)
        linear.weight.data.copy_(chosen.weight)
        if not chosen.kept:
            linear.register_forward_hook(lambda *call: torch.zeros_like(call[-1]))
    return twin


def sliced(model: PreTrainedModel, adapter: ModelAdapter, plan: Plan) -> PreTrainedModel:
    twin = copy.deepcopy(model)
    for site, chosen in plan.items():
        adapter.remove(twin, site, chosen)
    return twin


@torch.no_grad()
def logits(model: PreTrainedModel) -> Tensor:
    return model(IDS, use_cache=False).logits


def assert_same(small: PreTrainedModel, expected: PreTrainedModel) -> None:
    torch.testing.assert_close(logits(small), logits(expected), rtol=0, atol=1e-10)


@pytest.mark.parametrize("heads", ["kv", "query"])
def test_cut_equals_masked(case: tuple[PreTrainedModel, ModelAdapter], heads: Heads) -> None:
    model, adapter = case
    plan = drawn(model, adapter, adapter.sites(model, heads))
    small = sliced(model, adapter, plan)
    assert_same(small, masked(model, adapter, plan))
    assert (logits(small) - logits(model)).abs().max() > 1e-3  # the comparison can fail


@pytest.mark.parametrize(
    "gone",
    [
        pytest.param([(0, "attention")], id="attention of the first layer"),
        pytest.param([(2, "mlp")], id="MLP of the last layer"),
        pytest.param([(1, "attention"), (1, "mlp")], id="a whole layer"),
        pytest.param([(i, kind) for i in range(3) for kind in ("attention", "mlp")], id="all layers"),
    ],
)
def test_dropped_parts_answer_zeros(case: tuple[PreTrainedModel, ModelAdapter], gone: list[tuple[int, str]]) -> None:
    model, adapter = case
    plan = dropping(model, adapter, *gone)
    assert_same(sliced(model, adapter, plan), masked(model, adapter, plan))


@pytest.mark.parametrize("heads", ["kv", "query"])
def test_a_cut_model_can_be_cut_again(case: tuple[PreTrainedModel, ModelAdapter], heads: Heads) -> None:
    model, adapter = case
    once = sliced(model, adapter, drawn(model, adapter, adapter.sites(model, heads), seed=1))
    adapter.remove(once, first := adapter.sites(once)[0], candidate(once, adapter, first, []))
    plan = drawn(once, adapter, adapter.sites(once, heads), seed=2)
    assert first not in plan
    assert_same(sliced(once, adapter, plan), masked(once, adapter, plan))


def test_only_norms_of_sums_and_of_both_parts_stay(case: tuple[PreTrainedModel, ModelAdapter]) -> None:
    model, adapter = case
    sites = adapter.sites(model)
    for index, block in enumerate(adapter.blocks(model)):
        priced = sum(s.parameters(s.n_groups) for s in sites if s.block == index)
        norms = [module for name, module in block.named_children() if "norm" in name or name.startswith("ln_")]
        stays = len(norms) == 1 or not getattr(block, "do_layer_norm_before", True)  # it serves both parts, or the sum
        stay = sum(p.numel() for norm in norms for p in norm.parameters()) if stays else 0
        assert priced + stay == sum(p.numel() for p in block.parameters())


def test_pruned_leaves_the_block_alone(case: tuple[PreTrainedModel, ModelAdapter]) -> None:
    model, adapter = case
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modules = dict(model.named_modules())
    expected = logits(model)
    own = set(map(id, model.parameters()))
    for heads in ("kv", "query"):
        for site in adapter.sites(model, heads):
            block = adapter.blocks(model)[site.block]
            for count in (0, 1, site.n_groups):
                parts = adapter.pruned(block, site, candidate(model, adapter, site, list(range(count))))
                new = [p for part in parts.values() for p in part.parameters() if id(p) not in own]
                maps = [adapter.linear(block, site), *(block.get_submodule(c.path) for c in adapter.cuts(block, site))]
                whole = sum(p.numel() for linear in {*maps} for p in linear.parameters())
                stays = whole - site.n_groups * site.params_per_group  # of these maps, whatever goes
                assert sum(p.numel() for p in new) <= count * site.params_per_group + stays  # the rest is shared
                for parameter in new:
                    parameter.data.fill_(7.0)
    assert dict(model.named_modules()) == modules
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(logits(model), expected)


def test_generation_with_cache_equals_generation_without(case: tuple[PreTrainedModel, ModelAdapter]) -> None:
    model, adapter = case
    plan = drawn(model, adapter, adapter.sites(model), seed=3)
    first, *_, last = plan
    plan[first] = candidate(model, adapter, first, [])
    plan[last] = candidate(model, adapter, last, [])
    small = sliced(model, adapter, plan)
    if small.config._attn_implementation == "eager":  # its softmax is float32, which holds no mask of float64
        small.float()
    ids = IDS.clone()
    mask = torch.ones_like(ids)
    ids[0, :3], mask[0, :3] = 0, 0  # left padding

    def continued(ids: Tensor, mask: Tensor, **options: Any) -> Tensor:
        found = cast(Any, small).generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False, **options)
        assert isinstance(found, Tensor)
        return found[:, ids.shape[1] :]

    cached = continued(ids, mask, use_cache=True)
    assert torch.equal(cached, continued(ids, mask, use_cache=False))
    assert torch.equal(cached[:1], continued(ids[:1, 3:], mask[:1, 3:], use_cache=True))  # padded = alone


def test_sites_come_in_order_of_execution_and_name_linear_maps(case: tuple[PreTrainedModel, ModelAdapter]) -> None:
    model, adapter = case
    sites = adapter.sites(model)
    assert [(s.block, s.kind) for s in sites] == [(i, kind) for i in range(3) for kind in ("attention", "mlp")]
    for site in sites:
        assert model.get_submodule(site.name) is adapter.linear(adapter.blocks(model)[site.block], site)


@pytest.mark.parametrize("model_type", ["llama", "gpt_neox"])
def test_sites_need_no_weights(model_type: str) -> None:
    model, adapter = tiny(model_type), adapter_for(model_type)
    with torch.device("meta"):
        empty = type(model)(model.config)
    assert adapter.sites(empty) == adapter.sites(model)


def test_query_heads_go_evenly_from_every_kv_group() -> None:
    model, adapter = tiny("llama"), adapter_for("llama")
    assert isinstance(adapter, Transformer)
    site = adapter.sites(model, "query")[0]
    assert (site.n_groups, site.spread) == (2, 3)
    adapter.remove(model, site, candidate(model, adapter, site, [1]))
    assert adapter.layer_config(adapter.blocks(model)[0]) == {
        "num_attention_heads": 3,
        "num_key_value_heads": 3,
        "intermediate_size": 17,
    }


def test_layer_config_lists_dropped_parts() -> None:
    model, adapter = tiny("opt"), adapter_for("opt")
    assert isinstance(adapter, Transformer)
    small = sliced(model, adapter, dropping(model, adapter, (0, "attention"), (1, "mlp")))
    entries = [adapter.layer_config(block) for block in adapter.blocks(small)]
    assert entries == [
        {"skip": ["attention"], "num_attention_heads": 1, "ffn_dim": 17},
        {"skip": ["mlp"], "num_attention_heads": 6},
        {"num_attention_heads": 6, "ffn_dim": 17},
    ]


def test_unknown_families_and_wrapped_maps_are_refused() -> None:
    with pytest.raises(UnsupportedModel, match="'bloom' has no adapter; supported are cohere, falcon"):
        adapter_for("bloom")
    model = tiny("llama")
    model.set_submodule("model.layers.1.mlp.up_proj", nn.Sequential(nn.Linear(24, 17)))
    with pytest.raises(UnsupportedModel, match=r"mlp\.up_proj is Sequential; prune before quantizing"):
        adapter_for("llama").sites(model)


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "opt", "gpt_neox"])
def test_a_bias_goes_with_its_sub_layer_and_is_priced_where_there_was_none(model_type: str) -> None:
    adapter, model = adapter_for(model_type), tiny(model_type)
    assert isinstance(adapter, Transformer)
    for site in adapter.sites(model):
        linear = adapter.linear(adapter.blocks(model)[site.block], site)
        priced, was = adapter.with_bias(model, site), linear.bias
        linear.bias = torch.nn.Parameter(torch.zeros(linear.out_features))
        found = next(s for s in adapter.sites(model) if s.name == site.name)  # as counted in its tensors
        assert found == priced
        assert (priced == site) == (was is not None)
        assert adapter.maps(adapter.blocks(model)[site.block], site)[-1] is linear
    assert adapter.biased(adapter.blocks(model)[0]) == ("attention", "mlp")


def test_grafted_shares_whatever_is_not_on_the_way() -> None:
    block = nn.ModuleDict({"a": nn.ModuleDict({"x": nn.Linear(2, 2), "y": nn.Linear(2, 2)}), "b": nn.Linear(2, 2)})
    other, before = nn.Linear(2, 2), dict(block.named_modules())
    twin = grafted(block, {"a.x": other})
    assert dict(block.named_modules()) == before
    assert dict(twin.named_modules()) == before | {"": twin, "a": twin.get_submodule("a"), "a.x": other}
    assert twin.get_submodule("a") is not before["a"]
    assert grafted(block, {"a": other, "b": other}).get_submodule("b") is other
