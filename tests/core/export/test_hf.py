"""What an exported model must do as well as the pruned network in memory, for every family."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

from prunekit.export import save, to_transformers
from prunekit.layer.candidates import Candidate
from prunekit.models import classes as modeling
from prunekit.models.adapters.find import adapter_for
from prunekit.models.adapters.transformer import Transformer
from prunekit.plugins.adapter import ModelAdapter
from prunekit.space.forms import RANKS
from prunekit.space.sites import Site
from prunekit.testing.models import EXPERTS, HYBRIDS, SIZES, tiny

modeling.register()

IDS = torch.tensor([[3, 14, 15, 9, 26, 5, 35, 8, 58], [2, 7, 18, 28, 18, 28, 45, 9, 4]])
SCALED = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 4}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}  # made anew where a text is longer than the model
LONG = {"rope_type": "longrope", "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 4}
LONG_PHI = {"head_dim": 4, "rope_parameters": LONG | {"short_factor": [1.0] * 2, "long_factor": [2.0] * 2}}
COMPENSATED = {"compensated": True}  # maps whose columns were cut get a bias, as finishers may give them
BIASED = ("falcon", "gpt_neox", "opt", "starcoder2")  # on all linear maps
UNEQUAL = {
    **{model_type: (model_type, {}) for model_type in SIZES},
    "llama-biased": ("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    "llama-scaled-rope": ("llama", {"rope_parameters": SCALED}),
    "llama-yarn": ("llama", {"rope_parameters": YARN}),
    "llama-longrope": (
        "llama",
        {"rope_parameters": LONG | {"short_factor": [1.0] * 2, "long_factor": [2.0] * 2}},
    ),
    "llama-dynamic-rope": ("llama", {"rope_parameters": DYNAMIC, "max_position_embeddings": 6}),
    "mistral-sliding": ("mistral", {"sliding_window": 4}),
    "qwen2-sliding": ("qwen2", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}),
    "opt-norms-after": ("opt", {"do_layer_norm_before": False, "word_embed_proj_dim": 10}),
    "llama-compensated": ("llama", COMPENSATED),
    "qwen2-compensated": ("qwen2", COMPENSATED),
    "opt-compensated": ("opt", COMPENSATED | {"enable_bias": False}),
    "gpt_neox-sequential": ("gpt_neox", {"use_parallel_residual": False, "tie_word_embeddings": True}),
}


def cut(
    model_type: str,
    keep: Callable[[Site], int],
    adapter: ModelAdapter | None = None,
    *,
    compensated: bool = False,
    **overrides: Any,
) -> PreTrainedModel:
    """A tiny model whose sites keep their last groups, as many as `keep` says."""
    model, adapter = tiny(model_type, **overrides), adapter or adapter_for(model_type)
    sites = adapter.sites(model)
    for site in sites:
        weight = adapter.linear(adapter.blocks(model)[site.block], site).weight.detach()
        adapter.remove(model, site, Candidate(tuple(range(site.n_groups - keep(site), site.n_groups)), weight))
    for site in sites:
        if compensated and keep(site):
            linear = adapter.linear(adapter.blocks(model)[site.block], site)
            linear.bias = nn.Parameter(torch.randn(linear.out_features, dtype=torch.float64))
    return model


def extremes(site: Site) -> int:
    """Attention of the first layer and MLP of the last are dropped; elsewhere one group, one neuron, an odd width."""
    counts = {(0, "attention"): 0, (0, "mlp"): 7, (1, "attention"): 1, (1, "mlp"): 1, (2, "mlp"): 0}
    return counts.get((site.block, site.kind), max(1, site.n_groups - 1))


def factored(model_type: str, **overrides: Any) -> PreTrainedModel:
    """A tiny model whose linear maps are two, each of a rank of its own, but for every fifth."""
    model, adapter = tiny(model_type, **overrides), adapter_for(model_type)
    for number, site in enumerate(adapter.sites_of(model, RANKS)):
        weight = adapter.linear(adapter.blocks(model)[site.block], site).weight.detach()
        if number % 5 != 3:
            rank = 1 + number % (site.n_groups - 1)
            u, s, vt = torch.linalg.svd(weight, full_matrices=False)
            pair = u[:, :rank] * s[:rank], vt[:rank]
            adapter.remove(model, site, Candidate(None, pair[0] @ pair[1], pair))
    return model


@torch.no_grad()
def logits(model: PreTrainedModel) -> Tensor:
    return model(IDS, use_cache=False).logits


def assert_same(model: PreTrainedModel, other: PreTrainedModel, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(logits(model), logits(other), rtol=0, atol=tolerance)


def count(model: PreTrainedModel) -> int:
    return sum(p.numel() for p in model.parameters())


def continued(model: PreTrainedModel, ids: Tensor, mask: Tensor, **options: Any) -> Tensor:
    found = cast(Any, model).generate(ids, attention_mask=mask, max_new_tokens=7, do_sample=False, **options)
    return found[:, ids.shape[1] :]


def load(directory: Path, auto: Any = AutoModelForCausalLM) -> PreTrainedModel:
    return auto.from_pretrained(directory).eval()


def load_head(auto: Any, directory: Path, **options: Any) -> Any:
    """A model that classifies into three, whose head is new."""
    return auto.from_pretrained(directory, num_labels=3, **options).eval()


@pytest.fixture(scope="module", params=UNEQUAL)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[PreTrainedModel, Path]:
    """A pruned network in memory, and where its export was saved."""
    model_type, overrides = UNEQUAL[request.param]
    model = cut(model_type, extremes, **overrides)
    directory = tmp_path_factory.mktemp(request.param)
    save(to_transformers(model, adapter_for(model_type)), directory)
    return model, directory


# -- layers that differ --------------------------------------------------------------------------------


def test_layers_of_equal_size_need_our_class_only_for_biases_the_stock_class_lacks() -> None:
    for model_type in SIZES:
        small = cut(model_type, lambda site: site.n_groups, compensated=True)
        exported = to_transformers(small, adapter_for(model_type))
        assert type(exported).__name__.startswith("Prunekit") == (model_type not in BIASED)
        assert_same(exported, small)


def test_in_memory_the_export_shares_its_tensors() -> None:
    model = cut("llama", extremes)
    exported = to_transformers(model, adapter_for("llama"))
    assert_same(exported, model)
    theirs = {p.data_ptr() for p in model.parameters()}
    assert all(p.data_ptr() in theirs for p in exported.parameters())


@pytest.mark.parametrize("model_type", ["llama", "gpt_neox"])
def test_rotary_tables_are_whole_whatever_the_dtype(model_type: str, tmp_path: Path) -> None:
    model = cut(model_type, extremes).bfloat16()  # rounds the tables as well
    exported = to_transformers(model, adapter_for(model_type))
    save(exported, tmp_path)
    tables, loaded = dict(exported.named_buffers()), dict(load(tmp_path).named_buffers())
    assert tables.keys() == loaded.keys() == dict(model.named_buffers()).keys()
    assert all(torch.equal(tables[name], loaded[name]) and tables[name].dtype == torch.float32 for name in tables)


def test_it_loads_as_it_was(case: tuple[PreTrainedModel, Path]) -> None:
    model, directory = case
    loaded = load(directory)
    assert type(loaded).__name__.startswith("Prunekit")
    assert loaded.dtype == model.dtype
    assert count(loaded) == count(model)
    assert_same(loaded, model, tolerance=1e-5)  # stock norms compute in float32


def test_it_generates_the_same_with_any_cache_and_padding(case: tuple[PreTrainedModel, Path]) -> None:
    loaded, ids = load(case[1]), IDS.clone()
    if loaded.config._attn_implementation == "eager":  # its softmax is float32, which holds no mask of float64
        loaded.float()
    mask = torch.ones_like(ids)
    ids[0, :3], mask[0, :3] = 0, 0
    plain = continued(loaded, ids, mask, use_cache=False)
    assert torch.equal(plain, continued(loaded, ids, mask))
    assert torch.equal(plain, continued(loaded, ids, mask, cache_implementation="static"))
    assert torch.equal(plain[:1], continued(loaded, ids[:1, 3:], mask[:1, 3:]))


def test_eager_attention_reaches_every_layer(case: tuple[PreTrainedModel, Path]) -> None:
    loaded = load(case[1])
    expected = logits(loaded)
    loaded.set_attn_implementation("eager")
    theirs = [module for module in loaded.modules() if not hasattr(module, "rope_type")]  # which attends to nothing
    configs = {id(c): c for m in theirs if (c := getattr(m, "config", None)) is not None}
    assert {c._attn_implementation for c in configs.values()} == {"eager"}
    torch.testing.assert_close(logits(loaded), expected, rtol=0, atol=1e-5)  # eager softmax is float32
    with torch.no_grad():
        found = loaded(IDS, use_cache=False, output_attentions=True, output_hidden_states=True)
    assert len(found.hidden_states) == loaded.config.num_hidden_layers + 1
    seen = [each for each in found.attentions if each is not None]
    assert len(seen) == loaded.config.num_hidden_layers - 1  # the dropped one has none


def test_backward_fills_every_gradient(case: tuple[PreTrainedModel, Path]) -> None:
    loaded = load(case[1]).train()
    loaded(IDS, labels=IDS).loss.backward()
    assert [name for name, p in loaded.named_parameters() if p.grad is None] == []
    expected = {name: p.grad for name, p in loaded.named_parameters()}
    loaded.zero_grad()
    loaded.activation_checkpointing_enable()
    loaded(IDS, labels=IDS, use_cache=False).loss.backward()
    for name, parameter in loaded.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name])


def test_what_was_loaded_can_be_saved_and_pruned_again(case: tuple[PreTrainedModel, Path], tmp_path: Path) -> None:
    loaded = load(case[1])
    loaded.save_pretrained(tmp_path / "again")
    assert_same(load(tmp_path / "again"), loaded)

    adapter = adapter_for(loaded.config.model_type)
    site = adapter.sites(loaded)[-1]  # attention of the last layer, whose MLP is gone already
    weight = adapter.linear(adapter.blocks(loaded)[site.block], site).weight.detach()
    adapter.remove(loaded, site, Candidate((), torch.zeros_like(weight)))
    exported = to_transformers(loaded, adapter)
    norms_after = loaded.config.model_type == "prunekit_opt" and not loaded.config.do_layer_norm_before
    assert exported.config.num_hidden_layers == (3 if norms_after else 2)
    scaled = "gemma" in loaded.config.model_type  # by √d, in float32 or as exact as the weights
    assert_same(exported, loaded, tolerance=1e-5 if scaled else 1e-10)


def test_the_base_model_loads_too(case: tuple[PreTrainedModel, Path]) -> None:
    model, directory = case
    base = load(directory, AutoModel)
    assert type(base) is modeling.define(modeling.FAMILIES[model.config.model_type])[1]
    with torch.no_grad():
        expected = model.base_model(IDS).last_hidden_state
        torch.testing.assert_close(base(IDS).last_hidden_state, expected, rtol=0, atol=1e-5)


def test_heads_that_classify_stand_on_the_same_base_model(case: tuple[PreTrainedModel, Path]) -> None:
    model, directory = case
    family = modeling.FAMILIES[model.config.model_type]
    heads = modeling.define_heads(family)
    assert ("AutoModelForSequenceClassification" in heads) == (family.model_type not in ("cohere", "granite"))
    for auto, head in heads.items():
        loaded = load_head(modeling.HEADS[auto][0], directory)
        assert type(loaded) is head
        expected = dict(cast(nn.Module, model.base_model).named_parameters())
        for name, parameter in loaded.base_model.named_parameters():
            assert parameter.shape == expected[name].shape
            assert torch.equal(parameter.double(), expected[name])
        with torch.no_grad():
            assert loaded(IDS).logits.shape in ((2, 3), (2, 9, 3))


def test_config_says_every_size_and_nothing_else(case: tuple[PreTrainedModel, Path]) -> None:
    model, directory = case
    config = json.loads((directory / "config.json").read_text())
    names = set(config)
    assert not names & {"allow_global_per_layer_attribute_access", "auto_map", "_heterogeneity_spec"}
    assert names >= {"per_layer_config", *(["head_dim"] if model.config.model_type != "falcon" else [])}
    assert list(config["per_layer_config"]) == ["0", "1", "2"]
    assert config["architectures"] == [type(load(directory)).__name__]
    assert config["dtype"] == "float64"
    assert {path.suffix for path in directory.iterdir()} == {".json", ".safetensors"}
    family = model.config.model_type
    width = modeling.FAMILIES[family].width
    grouped = {name: 1} if (name := modeling.FAMILIES[family].kv_heads) else {}
    extra = {"biased": ["mlp"]} if "compensated" in directory.name else {}
    assert config["per_layer_config"]["0"] == (
        {width: 7, "num_attention_heads": 1, "skip": ["attention"]} | grouped | extra
    )
    assert config["per_layer_config"]["1"][width] == 1
    assert config["per_layer_config"]["2"]["skip"] == ["mlp"]


# -- layers that agree: stock classes -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model_type", "overrides", "heads", "expected"),
    [
        pytest.param("llama", {}, 2, "LlamaForCausalLM", id="llama"),
        pytest.param("llama", {"num_key_value_heads": 6}, 5, "MistralForCausalLM", id="5 heads do not divide 24"),
        pytest.param(
            "llama",
            {"num_key_value_heads": 6, "rope_parameters": SCALED, "head_dim": 10},
            5,
            "MistralForCausalLM",
            id="the same with scaled rope and wide heads",
        ),
        pytest.param(
            "llama",
            {"num_key_value_heads": 6, "attention_bias": True},
            5,
            "PrunekitLlamaForCausalLM",
            id="mistral has no biases",
        ),
        pytest.param("mistral", {"num_key_value_heads": 6}, 5, "MistralForCausalLM", id="mistral"),
        pytest.param("qwen2", {"num_key_value_heads": 6}, 5, "Qwen2ForCausalLM", id="qwen2"),
        pytest.param("qwen3", {"num_key_value_heads": 6}, 5, "Qwen3ForCausalLM", id="qwen3"),
        pytest.param("phi3", {"num_key_value_heads": 6}, 5, "Phi3ForCausalLM", id="phi3"),
        pytest.param("phi3", LONG_PHI, 2, "PrunekitPhi3ForCausalLM", id="phi3 counts factors by heads"),
        pytest.param("gemma2", {"num_key_value_heads": 6}, 4, "Gemma2ForCausalLM", id="gemma2"),
        pytest.param("gemma3_text", {"num_key_value_heads": 6}, 5, "PrunekitGemma3ForCausalLM", id="5 heads of gemma3"),
        pytest.param("falcon", {}, 2, "PrunekitFalconForCausalLM", id="falcon with fewer heads"),
        pytest.param("opt", {}, 6, "OPTForCausalLM", id="opt with all heads"),
        pytest.param("opt", {}, 4, "PrunekitOPTForCausalLM", id="opt with fewer heads"),
        pytest.param("gpt_neox", {}, 6, "GPTNeoXForCausalLM", id="gpt_neox with all heads"),
        pytest.param("gpt_neox", {}, 3, "PrunekitGPTNeoXForCausalLM", id="gpt_neox with fewer heads"),
    ],
)
def test_equal_layers_use_the_stock_class_that_can_hold_them(
    model_type: str, overrides: dict[str, Any], heads: int, expected: str, tmp_path: Path
) -> None:
    model = cut(model_type, lambda site: heads if site.kind == "attention" else 11, **overrides)
    exported = to_transformers(model, adapter_for(model_type))
    assert type(exported).__name__ == expected
    assert_same(exported, model)
    save(exported, tmp_path, code="bundled")
    loaded = load(tmp_path)
    assert type(loaded).__name__ == expected
    assert count(loaded) == count(model)
    assert_same(loaded, model, tolerance=2e-5)
    if not expected.startswith("Prunekit"):
        assert "auto_map" not in (tmp_path / "config.json").read_text()
        assert not list(tmp_path.glob("*.py"))


@pytest.mark.parametrize("model_type", SIZES)
def test_whole_layers_are_left_out(model_type: str, tmp_path: Path) -> None:
    overrides = (
        {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1} if "qwen" in model_type else {}
    )
    model = cut(model_type, lambda site: 0 if site.block == 0 else site.n_groups, **overrides)
    exported = to_transformers(model, adapter_for(model_type))
    assert type(exported).__name__ == type(model).__name__  # stock
    assert exported.config.num_hidden_layers == 2
    if overrides:
        assert exported.config.layer_types == ["sliding_attention"] * 2  # the full one was dropped
    mask = torch.ones_like(IDS)
    assert_same(exported, model)
    assert torch.equal(continued(exported, IDS, mask), continued(model, IDS, mask, use_cache=False))
    save(exported, tmp_path)
    assert_same(load(tmp_path), model, tolerance=1e-5)


@pytest.mark.parametrize("name", UNEQUAL)
def test_maps_of_low_rank_are_saved_and_load_in_every_family(name: str, tmp_path: Path) -> None:
    model_type, overrides = UNEQUAL[name]
    model = factored(model_type, **{key: value for key, value in overrides.items() if key != "compensated"})
    exported = to_transformers(model, adapter_for(model_type))
    assert type(exported).__name__.startswith("Prunekit")
    assert_same(exported, model)
    save(exported, tmp_path)
    loaded, mask = load(tmp_path), torch.ones_like(IDS)
    assert (type(loaded), count(loaded)) == (type(exported), count(model))
    assert_same(loaded, model, tolerance=1e-4)  # in float32
    assert torch.equal(continued(exported, IDS, mask), continued(model, IDS, mask, use_cache=False))
    biases = [name for name, _ in exported.named_parameters() if name.endswith(".v.bias")]
    assert not biases, "the bias is behind both factors"


@pytest.mark.parametrize("model_type", [name for name in SIZES if modeling.FAMILIES[name].patches])
def test_maps_beside_mlps_are_saved_and_load_in_every_family_that_has_them(model_type: str, tmp_path: Path) -> None:
    model, adapter = cut(model_type, lambda site: max(1, site.n_groups - site.block)), adapter_for(model_type)
    bare = logits(model)
    for site in adapter.sites(tiny(model_type)):
        if site.kind == "mlp" and site.block != 1:  # of ranks of their own, and one block without
            generator = torch.Generator().manual_seed(site.block)
            left = 0.2 * torch.randn(24, 1 + site.block, generator=generator, dtype=torch.float64)
            adapter.add_patch(adapter.blocks(model)[site.block], site, left, left.T.flip(1).contiguous())
    assert not torch.allclose(bare, logits(model))
    exported = to_transformers(model, adapter)
    assert [cast(Any, exported).config.per_layer_config[i].patch for i in range(3)] == [1, 0, 3]
    assert_same(exported, model)
    assert count(exported) == count(model)
    save(exported, tmp_path)
    loaded, mask = load(tmp_path), torch.ones_like(IDS)
    assert (type(loaded), count(loaded)) == (type(exported), count(model))
    assert_same(loaded, model, tolerance=1e-3)  # in float32
    assert torch.equal(continued(exported, IDS, mask), continued(model, IDS, mask, use_cache=False))
    if model_type in ("llama", "qwen3"):  # what it holds is what its sites say, the maps as what goes with the MLP
        sites = adapter_for(exported.config.model_type).sites(exported)
        blocks = cast(Any, exported).model.layers
        assert sum(site.parameters(site.n_groups) for site in sites) == sum(p.numel() for p in blocks.parameters())


@pytest.mark.parametrize("ranks", [{"mlp.down_proj": 0}, {"mlp.side_proj": 2}])
def test_ranks_that_no_layer_can_have_are_one_sentence(ranks: dict[str, int]) -> None:
    config: Any = modeling.define(modeling.FAMILIES["llama"])[0]
    with pytest.raises(StrictDataclassError, match="layer 0: ranks names linear maps, each with a rank of 1 or more"):
        config(num_hidden_layers=1, per_layer_config={0: {"ranks": ranks}})


def test_one_layer_remains_when_all_are_dropped() -> None:
    model = cut("llama", lambda _: 0)
    exported = to_transformers(model, adapter_for("llama"))
    assert exported.config.num_hidden_layers == 1
    assert exported.config.per_layer_config[0].skip == ["attention", "mlp"]
    assert_same(exported, model)


# -- a family of a third party ---------------------------------------------------------------------------------


class SeedOss(Transformer):
    """What a plug-in writes for one more family."""

    family = modeling.llama_like("seed_oss", "SeedOss")


def test_a_new_family_is_data(tmp_path: Path) -> None:
    adapter = SeedOss()
    model = cut("seed_oss", extremes, adapter)
    exported = to_transformers(model, adapter)
    assert_same(exported, model)
    modeling.register([adapter.family])
    save(exported, tmp_path)
    assert_same(load(tmp_path), model, tolerance=1e-5)
    with pytest.raises(ValueError, match="the code of SeedOss models is not prunekit's own"):
        save(exported, tmp_path / "bundled", code="bundled")


# -- the directory --------------------------------------------------------------------------------------------


def test_weights_keep_their_dtype_and_ties(tmp_path: Path) -> None:
    model = cut("qwen2", extremes).bfloat16()
    save(to_transformers(model, adapter_for("qwen2")), tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
    with safe_open(tmp_path / "model.safetensors", "pt") as weights:
        assert {weights.get_slice(key).get_dtype() for key in weights.keys()} == {"BF16"}  # noqa: SIM118
        assert "lm_head.weight" not in weights.keys()  # noqa: SIM118
    loaded: Any = load(tmp_path)
    assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight


def test_a_model_is_not_saved_over_another(tmp_path: Path) -> None:
    exported = to_transformers(cut("llama", extremes), adapter_for("llama"))
    save(exported, tmp_path)
    with pytest.raises(FileExistsError, match="already holds a model"):
        save(exported, tmp_path)
    with pytest.raises(ValueError, match="code is import or bundled, not 'pickled'"):
        save(exported, tmp_path / "other", code=cast(Any, "pickled"))


def mixed(site: Site) -> int:
    """As `extremes`, where something has to stay; experts and units of mixers differ by layer."""
    counts = {"experts": 2 + site.block, "mixer": site.n_groups - site.block // 2}
    return max(site.least, min(site.n_groups, counts.get(site.kind, extremes(site))))


@pytest.mark.parametrize("model_type", [*EXPERTS, *HYBRIDS])
def test_heads_of_unequal_mixtures_and_hybrids_stand_on_the_same_base_model(model_type: str, tmp_path: Path) -> None:
    model = cut(model_type, mixed).float()
    save(to_transformers(model, adapter_for(model_type)), tmp_path)
    heads = modeling.define_heads(modeling.FAMILIES[model_type])
    assert len(heads) == (0 if model_type in ("olmoe", "lfm2") else 2)  # of which transformers has none
    base = cast(Any, model).base_model
    with torch.no_grad():
        expected = base(IDS, use_cache=False).last_hidden_state
    for auto, head in heads.items():
        loaded = load_head(modeling.HEADS[auto][0], tmp_path)
        assert type(loaded) is head
        assert loaded.config.model_type == f"prunekit_{model_type}"
        sizes = {name: parameter.shape for name, parameter in base.named_parameters()}
        assert {name: parameter.shape for name, parameter in loaded.base_model.named_parameters()} == sizes
        with torch.no_grad():
            found, answered = loaded.base_model(IDS, use_cache=False).last_hidden_state, loaded(IDS).logits
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
            scores = loaded.score(found)
        whole = scores if "Token" in auto else scores[:, -1]
        torch.testing.assert_close(answered, whole, rtol=0, atol=1e-5)


REMOTE = """
import sys

class Absent:  # prunekit is not installed here
    def find_spec(self, name, *_):
        if name.split(".")[0] == "prunekit":
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Absent())
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification

def check(directory):
    trusted, name = dict(trust_remote_code=True), "Prunekit" + sys.argv[4]
    heads = AutoModelForSequenceClassification, AutoModelForTokenClassification  # first: nothing else is known yet
    for suffix, shape, auto in zip(("Sequence", "Token"), ((2, 3), (2, 9, 3)), heads):
        loaded = auto.from_pretrained(directory, num_labels=3, **trusted).eval()
        assert type(loaded).__name__ == name + "For" + suffix + "Classification"
        assert loaded(probe["ids"]).logits.shape == shape
    assert type(AutoConfig.from_pretrained(directory, **trusted)).__name__ == name + "Config"
    assert type(AutoModel.from_pretrained(directory, **trusted)).__name__ == name + "Model"
    model = AutoModelForCausalLM.from_pretrained(directory, **trusted).eval()
    with torch.no_grad():
        torch.testing.assert_close(model(probe["ids"]).logits, probe["logits"], rtol=0, atol=1e-5)
    model.set_attn_implementation("eager")
    assert model.config._attn_implementation == "eager"
    assert AutoTokenizer.from_pretrained(directory, **trusted)("b a").input_ids == [1, 0]
    return model

probe = load_file(sys.argv[2])
first = check(sys.argv[1])
first.save_pretrained(sys.argv[3])
AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=True).save_pretrained(sys.argv[3])
check(sys.argv[3])
assert not [name for name in sys.modules if name.split(".")[0] == "prunekit"]
"""


@pytest.mark.parametrize(
    ("model_type", "prefix", "low_rank"),
    [("gpt_neox", "GPTNeoX", False), ("llama", "Llama", False), ("gpt_neox", "GPTNeoX", True)],
)
def test_bundled_code_needs_no_prunekit(
    model_type: str, prefix: str, low_rank: bool, tmp_path: Path, forks: Any
) -> None:
    model = factored(model_type) if low_rank else cut(model_type, extremes)
    exported = to_transformers(model, adapter_for(model_type))
    words = Tokenizer(models.WordLevel({"a": 0, "b": 1}))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words)
    save(exported, tmp_path / "first", tokenizer, code="bundled")
    assert (tmp_path / "first/modeling_prunekit.py").read_bytes() == Path(modeling.__file__).read_bytes()
    save_file({"ids": IDS, "logits": logits(model)}, tmp_path / "probe.safetensors")
    script = tmp_path / "remote.py"
    script.write_text(REMOTE)
    done = forks.run(
        [sys.executable, "-P", script, *(tmp_path / name for name in ("first", "probe.safetensors", "second")), prefix],
        env=os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules")},
    )
    assert done.returncode == 0, done.stderr
    assert_same(load(tmp_path / "second"), model, tolerance=1e-5)  # the registered class wins, no prompt
    assert AutoTokenizer.from_pretrained(tmp_path / "first")("b a").input_ids == [1, 0]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
