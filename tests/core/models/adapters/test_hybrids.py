"""Hybrid families: blocks with another mixer than attention lose its units or all of it, and the rest is as ever."""

from __future__ import annotations

import copy
import re
from itertools import combinations
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, Lfm2ForCausalLM, PreTrainedModel, Qwen3NextForCausalLM

import prunekit as pk
from prunekit.export.hf import to_transformers
from prunekit.layer.candidates import Candidate
from prunekit.models.adapters.find import adapter_for
from prunekit.models.adapters.transformer import Transformer
from prunekit.models.classes import FAMILIES, define
from prunekit.models.width import check_narrow
from prunekit.plugins.adapter import UnsupportedModel
from prunekit.space.sites import Site
from prunekit.testing import AdapterSuite
from prunekit.testing.models import HYBRIDS, tiny
from prunekit_strategies.exporters.onnx import ONNX

IDS = torch.tensor([[3, 14, 15, 9, 26, 5, 35, 8, 58], [2, 7, 18, 28, 18, 28, 45, 9, 4]])
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "lfm2-bare": ("lfm2", {"conv_bias": False, "tie_word_embeddings": False, "block_auto_adjust_ff_dim": False}),
    "qwen3_next-biased": ("qwen3_next", {"attention_bias": True, "decoder_sparse_step": 2, "mlp_only_layers": []}),
    "qwen3_next-even": ("qwen3_next", {"linear_num_value_heads": 3, "num_key_value_heads": 6}),
}


SLOW = {"lfm2-bare", "qwen3_next-even"}  # what is special in them is as in others


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in VARIANTS])
class TestEveryVariant(AdapterSuite):
    @pytest.fixture(autouse=True)
    def _plugin(self, name: str) -> None:
        self.variant = VARIANTS[name]
        type(self).plugin = adapter_for(self.variant[0])

    @pytest.fixture
    def model(self) -> PreTrainedModel:
        return tiny(self.variant[0], **self.variant[1]).requires_grad_(False)


class Case:
    """A tiny model of a hybrid family."""

    def __init__(self, model_type: str, **overrides: Any) -> None:
        self.model, found = tiny(model_type, **overrides).requires_grad_(False), adapter_for(model_type)
        assert isinstance(found, Transformer)
        self.adapter, self.sites = found, found.sites(self.model)

    def candidate(self, site: Site, kept: Any) -> Candidate:
        own = self.adapter.linear(self.adapter.blocks(self.model)[site.block], site).weight
        weight, columns = torch.zeros_like(own), site.columns(sorted(kept))
        weight[:, columns] = own[:, columns]
        return Candidate(tuple(sorted(kept)), weight)

    def cut(self, keeps: dict[tuple[int, str], int]) -> PreTrainedModel:
        """With so many groups, the first, at some sites, as it is exported."""
        small = copy.deepcopy(self.model)
        for site in self.sites:
            if (kept := keeps.get((site.block, site.kind))) is not None:
                self.adapter.remove(small, site, self.candidate(site, range(max(kept, site.least))))
        return to_transformers(small, self.adapter)

    def site(self, block: int, kind: str) -> Site:
        return next(site for site in self.sites if (site.block, site.kind) == (block, kind))


@pytest.fixture(params=HYBRIDS)
def case(request: pytest.FixtureRequest) -> Case:
    return Case(request.param)


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(IDS, use_cache=False).logits


def test_a_site_is_what_its_block_has(case: Case) -> None:
    behind = {"lfm2": [["mlp"]] * 3, "qwen3_next": [["mlp", "experts"]] * 2 + [["mlp"]]}[case.model.config.model_type]
    wanted = zip(range(3), ["mixer", "attention", "mixer"], behind, strict=True)
    assert [(s.block, s.kind) for s in case.sites] == [
        (i, kind) for i, first, rest in wanted for kind in (first, *rest)
    ]
    assert all(site.cached_per_group == 0 for site in case.sites if site.kind != "attention")


def test_without_a_mixer_a_block_is_what_it_is_without_the_output_of_it(case: Case) -> None:
    small = case.cut({(0, "mixer"): 0})
    twin = copy.deepcopy(case.model)
    out = twin.get_submodule(case.site(0, "mixer").name)
    for parameter in out.parameters():
        parameter.data.zero_()
    torch.testing.assert_close(logits(small), logits(twin), rtol=0, atol=1e-10)
    assert (logits(small) - logits(case.model)).abs().max() > 1e-3
    assert small.config.per_layer_config[0].skip == ["mixer"]


def test_units_of_a_mixer_do_not_see_each_other(case: Case) -> None:
    """Over every set of them: outputs add up."""
    site = case.site(2, "mixer")
    block, units = case.adapter.blocks(case.model)[2], range(min(site.n_groups, 3))
    mixer = case.adapter.family.mixer
    assert mixer is not None
    hidden = torch.randn(2, 7, 24, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    bias = case.adapter.linear(block, site).bias
    bias = 0.0 if bias is None else bias

    def made(kept: Any) -> Tensor:
        module: Any = case.adapter.pruned(block, site, case.candidate(site, kept))[mixer.path]
        return module(hidden) - bias

    alone = [made([unit]) for unit in units]
    for size in (2, 3):
        for some in combinations(units, size):
            torch.testing.assert_close(made(some), cast(Tensor, sum(alone[unit] for unit in some)), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "keeps",
    [
        pytest.param({(0, "mixer"): 0, (2, "mixer"): 1, (1, "attention"): 1}, id="the first mixer"),
        pytest.param({(0, "mixer"): 1, (2, "mixer"): 0, (1, "attention"): 0}, id="attention and the last mixer"),
        pytest.param({(i, kind): 0 for i in range(3) for kind in ("mixer", "attention", "mlp")}, id="all that may go"),
    ],
)
def test_generation_is_the_same_with_every_cache_and_with_padding(
    case: Case, keeps: dict[tuple[int, str], int]
) -> None:
    small: Any = case.cut(keeps)
    ids, mask = IDS.clone(), torch.ones_like(IDS)
    ids[0, :3], mask[0, :3] = 0, 0  # on the left

    def continued(ids: Tensor, mask: Tensor, **options: Any) -> Tensor:
        return small.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False, **options)[:, ids.shape[1] :]

    wanted = continued(ids, mask, use_cache=False)
    assert torch.equal(continued(ids, mask, use_cache=True), wanted)
    assert torch.equal(continued(ids, mask, cache_implementation="static", disable_compile=True), wanted)
    assert torch.equal(continued(ids[:1, 3:], mask[:1, 3:], use_cache=True), wanted[:1])


def test_a_block_with_attention_is_left_to_count_tokens() -> None:
    case = Case("lfm2")
    small: Any = case.cut({(1, "attention"): 0, (1, "mlp"): 0, (0, "mixer"): 0, (0, "mlp"): 0})
    assert small.config.layer_types == ["full_attention", "conv"], "and the one without anything is gone"
    assert [list(layer.skip) for layer in small.config.per_layer_config] == [["attention", "mlp"], []]


def test_a_head_takes_its_queries_and_their_gates_along() -> None:
    case, width = Case("qwen3_next"), 6
    block = case.adapter.blocks(case.model)[1]
    q, k, *_ = case.adapter.cuts(block, case.site(1, "attention"))  # six query heads, two for each KV head
    assert q.index[1].sort().values.tolist() == list(range(2 * 2 * width, 4 * 2 * width))
    assert k.index[1].tolist() == list(range(width, 2 * width))
    site = next(site for site in case.adapter.sites(case.model, "query") if site.kind == "attention")
    by_query, *_ = case.adapter.cuts(block, site)
    rows = (torch.arange(3)[:, None] * 4 * width + torch.arange(2 * width)).flatten()
    assert by_query.index[0].sort().values.tolist() == rows.tolist(), "the first query head of every KV head"


def test_layers_tell_their_sizes_and_the_written_model_is_the_cut_one(case: Case, tmp_path: Path) -> None:
    small = case.cut({(0, "mixer"): 2, (1, "attention"): 2, (2, "mixer"): 1})
    assert isinstance(small, define(case.adapter.family)[2])
    key = cast(Any, case.adapter.family.mixer).keys[0]
    assert [getattr(small.config.per_layer_config[i], key) for i in (0, 2)] == [2, 1]
    small.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation="eager")
    assert type(again) is type(small)
    torch.testing.assert_close(logits(again), logits(small), rtol=0, atol=0)
    assert torch.equal(logits(to_transformers(again, case.adapter)), logits(small)), "and can be cut again"


@pytest.mark.parametrize(
    ("model_type", "keeps", "stock"),
    [
        ("lfm2", {(1, "attention"): 2} | {(i, "mlp"): 9 for i in range(3)}, Lfm2ForCausalLM),
        ("qwen3_next", {(1, "attention"): 2, (0, "mixer"): 2, (2, "mixer"): 2}, Qwen3NextForCausalLM),
    ],
)
def test_equal_sizes_are_of_the_stock_class(model_type: str, keeps: Any, stock: type, tmp_path: Path) -> None:
    small = Case(model_type).cut(keeps)
    assert type(small) is stock
    small.save_pretrained(tmp_path)
    again = cast(Any, stock).from_pretrained(tmp_path, experts_implementation="eager")
    torch.testing.assert_close(logits(again), logits(small), rtol=0, atol=0)


def test_equal_channels_are_no_stock_class() -> None:
    small = Case("lfm2").cut({(0, "mixer"): 12, (2, "mixer"): 12})
    assert type(small).__name__ == "PrunekitLfm2ForCausalLM"


@pytest.mark.parametrize(
    ("model_type", "entry", "says"),
    [
        ("lfm2", {"conv_channels": 0}, "layer 0: conv_channels is 0, and must be 1 or more"),
        ("lfm2", {"skip": ["conv"]}, "layer 0: skip lists attention, mixer and mlp, not conv"),
        ("qwen3_next", {"linear_num_key_heads": 4}, "layer 0: 6 value heads do not share 4 key heads evenly"),
        ("llama", {"skip": ["mixer"]}, "layer 0: skip lists attention and mlp, not mixer"),
    ],
)
def test_sizes_that_no_layer_can_have_are_refused(model_type: str, entry: dict[str, Any], says: str) -> None:
    values = tiny(model_type).config.to_dict()
    values["per_layer_config"] = {i: {"conv_channels": 24} | (entry if i == 0 else {}) for i in range(3)}
    with pytest.raises(Exception, match=re.escape(says)):
        define(FAMILIES[model_type])[0](**{k: v for k, v in values.items() if k != "model_type"})


def test_what_does_not_reach_mixers_is_refused_in_a_sentence(case: Case) -> None:
    with pytest.raises(UnsupportedModel, match=r"residual width of models of type .* stays as it is"):
        check_narrow(case.model, case.adapter)
    with pytest.raises(pk.WrongInput, match="a mixer with a state of its own; take format 'hf'"):
        ONNX().check(pk.Order(case.adapter, "groups", "import"))
