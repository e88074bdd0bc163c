"""The language model inside models of images and text: cut, saved and loaded, beside images and without."""

import copy
import json
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText, CLIPVisionModel, PreTrainedModel

from prunekit.errors import WrongInput
from prunekit.export import save, verify
from prunekit.export.hf import to_transformers
from prunekit.layer.candidates import Candidate
from prunekit.models.adapters.find import adapter_for
from prunekit.models.blocks import entered
from prunekit.models.opening import opened
from prunekit.plugins.adapter import ModelAdapter, UnsupportedModel
from prunekit.plugins.exporter import Order
from prunekit.plugins.registry import EXPORTERS
from prunekit.space.sites import Site
from prunekit.system.memory import Shares
from prunekit.testing import tiny

IMAGE = 60  # the token that an image's features take the place of
IDS = torch.tensor([[3, 14, *[IMAGE] * 4, 15, 9, 26, 5], [*[IMAGE] * 4, 2, 7, 18, 28, 18, 45]])
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "llava": ("llava", {}),
    "llava-mistral": ("llava", {"model_type": "mistral", "head_dim": 6, "sliding_window": None}),
    "llava-qwen2-tied": ("llava", {"model_type": "qwen2", "tie_word_embeddings": True}),
    "qwen2_5_vl": ("qwen2_5_vl", {}),
    "qwen2_5_vl-tied": ("qwen2_5_vl", {"tie_word_embeddings": True}),
}
SLOW = {"llava-mistral", "qwen2_5_vl-tied"}  # what is special in them is as in others
Case = tuple[PreTrainedModel, ModelAdapter]
Count = Callable[[Site], int]


@pytest.fixture(params=[pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in KINDS])
def case(request: pytest.FixtureRequest) -> Case:
    model_type, overrides = KINDS[request.param]
    adapter = adapter_for(model_type)
    return adapter.opened(tiny(model_type, **overrides)).requires_grad_(False), adapter


def pictures(model: PreTrainedModel, seed: int = 0) -> dict[str, Tensor]:
    """An image for each of two texts, as the model's processor would give them."""
    generator = torch.Generator().manual_seed(seed)
    if "llava" in model.config.model_type:
        return {"pixel_values": torch.randn(2, 3, 8, 8, generator=generator, dtype=model.dtype)}
    patches = torch.randn(32, 3 * 2 * 4 * 4, generator=generator, dtype=model.dtype)
    kinds = (IDS == IMAGE).int()
    return {"pixel_values": patches, "image_grid_thw": torch.tensor([[1, 4, 4]] * 2), "mm_token_type_ids": kinds}


@torch.no_grad()
def logits(model: PreTrainedModel, *, images: bool = True) -> Tensor:
    return model(IDS, use_cache=False, **(pictures(model) if images else {})).logits


def cut(model: PreTrainedModel, adapter: ModelAdapter, count: Count) -> PreTrainedModel:
    """Every site keeps its last groups."""
    small = copy.deepcopy(model)
    for site, chosen in chosen_of(model, adapter, count):
        adapter.remove(small, site, chosen)
    return small


def masked(model: PreTrainedModel, adapter: ModelAdapter, count: Count) -> PreTrainedModel:
    twin = copy.deepcopy(model)
    for site, chosen in chosen_of(model, adapter, count):
        linear = adapter.linear(adapter.blocks(twin)[site.block], site)
        linear.weight.data.copy_(chosen.weight)
        if not chosen.kept:
            linear.register_forward_hook(lambda *call: torch.zeros_like(call[-1]))
    return twin


def chosen_of(model: PreTrainedModel, adapter: ModelAdapter, count: Count) -> Iterable[tuple[Site, Candidate]]:
    for site in adapter.sites(model):
        kept = range(site.n_groups - count(site), site.n_groups)
        own = adapter.linear(adapter.blocks(model)[site.block], site).weight
        weight, columns = torch.zeros_like(own), site.columns(kept)
        weight[:, columns] = own[:, columns]
        yield site, Candidate(tuple(kept), weight)


def uneven(site: Site) -> int:
    """The attention of the first block and the MLP of the last go; the others differ."""
    if (site.block, site.kind) in ((0, "attention"), (2, "mlp")):
        return 0
    return 1 + site.block % 2 if site.kind == "attention" else 5 + 3 * site.block


def fewer(site: Site) -> int:
    """Two thirds of the heads, and 9 neurons."""
    return 2 if site.kind == "attention" else 9


def narrower(site: Site) -> int:
    """All heads, and 9 neurons."""
    return site.n_groups if site.kind == "attention" else 9


def assert_same(one: PreTrainedModel, other: PreTrainedModel) -> None:
    for images in (False, True):
        torch.testing.assert_close(logits(one, images=images), logits(other, images=images), rtol=0, atol=1e-10)


def rest_of(model: PreTrainedModel) -> dict[str, Tensor]:
    """All that is no block of the language model."""
    return {name: value for name, value in model.state_dict().items() if ".language_model.layers." not in name}


# -- in memory ----------------------------------------------------------------------------------------------


def test_sites_are_of_the_language_model_alone(case: Case) -> None:
    model, adapter = case
    names = [site.name for site in adapter.sites(model)]
    assert len(names) == 6
    assert all(name.startswith("model.language_model.layers.") for name in names)


@pytest.mark.parametrize("count", [uneven, fewer, narrower])
def test_cut_equals_masked_with_an_image_and_without(case: Case, count: Count) -> None:
    model, adapter = case
    small, twin = cut(model, adapter, count), masked(model, adapter, count)
    assert_same(small, twin)
    assert_same(to_transformers(small, adapter), twin)
    assert (logits(small) - logits(small, images=False)).abs().max() > 1e-3, "images count"
    assert (logits(small) - logits(model)).abs().max() > 1e-3, "and so does what is gone"


def test_the_walk_through_blocks_is_right_behind_an_image_and_beside_one(case: Case) -> None:
    """An image leaves nothing behind for the texts after it, and gives its own positions to every block."""
    model, adapter = case
    before, _ = entered(model, adapter, IDS)
    seen, wanted = list[dict[str, Any]](), logits(model)  # which Qwen2.5-VL remembers positions of
    hidden, calls = entered(model, adapter, IDS)
    assert torch.equal(hidden, before)
    with torch.no_grad():
        for call, block in zip(calls, adapter.blocks(model), strict=True):
            hidden = call(block, hidden)
        torch.testing.assert_close(adapter.logits(model, hidden), logits(model, images=False), rtol=0, atol=1e-10)

    def note(_: nn.Module, args: tuple[Any, ...], given: dict[str, Any]) -> None:
        seen.append(given | {"hidden_states": args[0]})

    with ExitStack() as stack, torch.no_grad():
        for block in adapter.blocks(model):
            stack.enter_context(block.register_forward_pre_hook(note, with_kwargs=True))
        logits(model)
    hidden = seen[0]["hidden_states"]
    with torch.no_grad():
        for given, block in zip(seen, adapter.blocks(model), strict=True):
            assert torch.equal(given["hidden_states"], hidden)
            hidden = block(**given)
        torch.testing.assert_close(adapter.logits(model, hidden), wanted, rtol=0, atol=1e-10)
    same = torch.equal(seen[0]["position_embeddings"][0][:1], calls[0].kwargs["position_embeddings"][0][:1])
    assert same == ("llava" in model.config.model_type), "an image has rows and columns where positions have three rows"


# -- on disk ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [uneven, narrower])
def test_it_is_saved_and_loaded_and_the_rest_is_there_to_the_byte(case: Case, count: Count, tmp_path: Path) -> None:
    model, adapter = case
    small = to_transformers(cut(model, adapter, count), adapter)
    save(small, tmp_path)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path).eval()
    assert type(loaded) is type(small)
    assert loaded.dtype == model.dtype
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight  # type: ignore[operator, union-attr]
    assert (loaded.lm_head.weight is loaded.get_input_embeddings().weight) == tied
    assert_same(loaded, small)
    there = rest_of(loaded)
    assert there.keys() == rest_of(model).keys()
    assert all(torch.equal(value, there[name]) for name, value in rest_of(model).items())
    stock = type(loaded) is type(model) and not type(loaded.model.language_model).__name__.startswith("Prunekit")
    assert stock == (count is narrower)
    again = adapter.opened(loaded)
    assert_same(to_transformers(cut(again, adapter, lambda site: site.n_groups), adapter), loaded)


def test_heads_that_stay_in_all_layers_alike_are_of_the_stock_llava(tmp_path: Path) -> None:
    adapter = adapter_for("llava")
    small = to_transformers(cut(tiny("llava"), adapter, fewer), adapter)
    save(small, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["model_type"], config["architectures"]) == ("llava", ["LlavaForConditionalGeneration"])
    assert config["text_config"]["model_type"] == "llama"
    assert {key: config["text_config"][key] for key in ("num_attention_heads", "num_key_value_heads")} == {
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    assert "per_layer_config" not in config["text_config"]


def test_code_of_ours_travels_with_a_qwen2_5_vl(tmp_path: Path) -> None:
    adapter = adapter_for("qwen2_5_vl")
    save(to_transformers(cut(tiny("qwen2_5_vl"), adapter, uneven), adapter), tmp_path, code="bundled")
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["auto_map"].keys() == {"AutoConfig", "AutoModel", "AutoModelForImageTextToText"}
    assert (tmp_path / "modeling_prunekit.py").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model_type", "code"), [("qwen2_5_vl", "bundled"), ("qwen2_5_vl", "import"), ("llava", "import")]
)
def test_a_fresh_process_finds_the_classes(model_type: str, code: Any, tmp_path: Path) -> None:
    """Bundled code runs where prunekit is not imported."""
    adapter = adapter_for(model_type)
    small = to_transformers(cut(tiny(model_type), adapter, uneven), adapter).float()
    save(small, tmp_path, code=code)
    found = verify(tmp_path, IDS, logits(small, images=False), sum(p.numel() for p in small.parameters()))
    assert found.model_class == type(small).__name__


@pytest.mark.parametrize("count", [uneven, narrower])
def test_it_generates_the_same_with_any_cache(case: Case, count: Count) -> None:
    model, adapter = case
    small: Any = to_transformers(cut(model, adapter, count), adapter)
    options: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, **pictures(small)}
    options |= {"attention_mask": torch.ones_like(IDS), "suppress_tokens": [IMAGE]}  # whose features there are none of
    plain = small.generate(IDS, use_cache=False, **options)
    assert torch.equal(plain, small.generate(IDS, **options))
    assert torch.equal(plain, small.generate(IDS, cache_implementation="static", **options))


def test_a_paged_model_is_the_model(case: Case, tmp_path: Path) -> None:
    model, _ = case
    save(model.float(), tmp_path)
    one, two = (opened(str(tmp_path), object(), device="cpu", shares=shares) for shares in (Shares(), Shares(blocks=1)))
    assert (one.fingerprint, one.dtype) == (two.fingerprint, two.dtype)
    assert all(torch.equal(table, two.model.get_buffer(name)) for name, table in one.model.named_buffers())
    assert torch.equal(logits(one.model), logits(two.model))


# -- refused ------------------------------------------------------------------------------------------------


def test_another_language_model_is_refused_by_its_type() -> None:
    model = tiny("llava", model_type="gemma2", head_dim=6, query_pre_attn_scalar=6)
    with pytest.raises(UnsupportedModel, match="a language model of type 'gemma2'; those of llama, mistral, qwen2, qw"):
        adapter_for("llava").opened(model)


@pytest.mark.parametrize("name", ["gguf", "onnx", "vllm"])
@pytest.mark.parametrize("model_type", ["llava", "qwen2_5_vl"])
def test_formats_of_language_models_alone_are_refused_before_any_work(name: str, model_type: str) -> None:
    order = Order(adapter_for(model_type), "groups", "import", config=tiny(model_type).config)
    with pytest.raises(WrongInput, match=r"takes images"):
        EXPORTERS.build(name).check(order)


def test_code_of_a_part_cannot_be_bundled() -> None:
    order = Order(adapter_for("llava"), "groups", "bundled", config=tiny("llava").config)
    with pytest.raises(WrongInput, match=r"not of a language model inside another; take code=import"):
        EXPORTERS.build("hf").check(order)


def test_the_tiny_llava_sees_by_a_clip() -> None:
    assert isinstance(tiny("llava").model.vision_tower, CLIPVisionModel)
