"""Whole runs on models of images and text: pruned on text, saved with what a processor needs, loaded with images."""

import json

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoTokenizer

import prunekit
from prunekit.demo import MODEL
from prunekit.errors import WrongInput
from prunekit.plugins.registry import EXPORTERS
from prunekit.run.export import export_model
from prunekit.testing import tiny

SETTINGS = {"image_processor_type": "CLIPImageProcessorPil", "size": {"shortest_edge": 8}}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A tiny model of each family with a tokenizer and the settings of a processor."""
    found = {}
    for family in ("llava", "qwen2_5_vl"):
        found[family] = path = tmp_path_factory.mktemp(family) / "model"
        tiny(family, vocab_size=2048, initializer_range=0.1).float().save_pretrained(path)
        AutoTokenizer.from_pretrained(MODEL).save_pretrained(path)
        (path / "preprocessor_config.json").write_text(json.dumps(SETTINGS))
        (path / "processor_config.json").write_text(json.dumps({"processor_class": "LlavaProcessor"}))
    return found


def rest_of(model):
    """What is in no block of the language model."""
    return {name: value for name, value in model.state_dict().items() if ".language_model.layers." not in name}


def image_of(family):
    """Token ids with an image among them, and that image."""
    ids = torch.tensor([[5, 7, 60, 60, 60, 60, 9, 11]])
    generator = torch.Generator().manual_seed(0)
    if family == "llava":
        return {"input_ids": ids, "pixel_values": torch.randn(1, 3, 8, 8, generator=generator)}
    patches = {"pixel_values": torch.randn(16, 96, generator=generator), "image_grid_thw": torch.tensor([[1, 4, 4]])}
    return {"input_ids": ids, "mm_token_type_ids": (ids == 60).int(), **patches}


@pytest.mark.parametrize(
    ("family", "equal"),
    [
        ("llava", False),
        pytest.param("llava", True, marks=pytest.mark.slow),
        pytest.param("qwen2_5_vl", False, marks=pytest.mark.slow),
        pytest.param("qwen2_5_vl", True, marks=pytest.mark.slow),
    ],
)
def test_a_run_by_name_gives_a_model_that_sees_as_that_in_memory(family, equal, folders, tmp_path, quick):
    folder, out = folders[family], tmp_path / "out"
    method = {"allocator": {"name": "uniform", "equal": True}} if equal else {}
    spared = {"spare__kinds": ["attention"]} if equal and family == "qwen2_5_vl" else {}
    # verified: a fresh process loads it, without prunekit where all layers agree, and compares logits
    small = prunekit.prune(folder, output=out, **quick(sparsity=0.1 if spared else 0.3, **method | spared))
    config = json.loads((out / "config.json").read_text())
    kinds = (config["model_type"], config["text_config"]["model_type"])
    assert any(kind.startswith("prunekit_") for kind in kinds) == (not equal)
    loaded = AutoModelForImageTextToText.from_pretrained(out).eval()
    asked = image_of(family)
    with torch.no_grad():
        found, expected = loaded(**asked).logits, small.model.float()(**asked).logits
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
        unseen = loaded(asked["input_ids"]).logits
    assert (found - unseen).abs().max() > 1e-2, "the image counts"
    before, after = rest_of(AutoModelForImageTextToText.from_pretrained(folder)), rest_of(loaded)
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    for name in ("preprocessor_config.json", "processor_config.json"):
        assert (out / name).read_bytes() == (folder / name).read_bytes()
    assert "model = AutoModelForImageTextToText.from_pretrained" in (out / "README.md").read_text()
    report = json.loads((out / "report.json").read_text())
    assert all("language_model" in site["name"] for site in report["sites"])
    assert report["budget"]["spent"] <= report["budget"]["limit"]


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_what_trains_and_what_exports_leave_alone_what_sees(family, folders, tmp_path, quick):
    folder, out = folders[family], tmp_path / "out"
    trained = {"finishers": [{"name": "distillation", "epochs": 1, "rate": 1e-3}], "allocator": "uniform"}
    prunekit.prune(folder, output=out, **quick(sparsity=0.3, verify=False, **trained))
    before, after = (AutoModelForImageTextToText.from_pretrained(path).state_dict() for path in (folder, out))
    seeing = [name for name in before if "language_model" not in name and name != "lm_head.weight"]
    assert seeing
    assert all(torch.equal(before[name], after[name]) for name in seeing)
    exported = export_model(str(out), [EXPORTERS.build("hf")], tmp_path / "again")
    again = AutoModelForImageTextToText.from_pretrained(tmp_path / "again").state_dict()
    assert all(torch.equal(value, again[name]) for name, value in after.items())
    assert {"preprocessor_config.json", "processor_config.json"} <= {file.name for file in exported.files}


def test_another_language_model_is_refused_before_any_work(folders, tmp_path, quick):
    path = tmp_path / "model"
    tiny("llava", model_type="gemma2", head_dim=6, query_pre_attn_scalar=6).float().save_pretrained(path)
    AutoTokenizer.from_pretrained(MODEL).save_pretrained(path)
    with pytest.raises(WrongInput, match="a language model of type 'gemma2'; those of llama"):
        prunekit.prune(path, output=tmp_path / "out", **quick(sparsity=0.3))
    assert not (tmp_path / "out.partial").exists()


def test_one_residual_width_is_refused_before_any_work(folders, tmp_path, quick):
    with pytest.raises(WrongInput, match="features of images enter it, too; leave width away"):
        prunekit.prune(folders["llava"], output=tmp_path / "out", **quick(sparsity=0.3, width="minitron"))
