"""What is no model of plain weights is told by name before a library reads it, and ties are those of the tensors."""

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import prunekit
from prunekit.errors import WrongInput
from prunekit.models.opening import load_tokenizer, loaded, opened, skeleton
from prunekit.models.places import _reached, at_hand
from prunekit.system.memory import SHARES, Shares
from prunekit.system.progress import warn_once

PAGED = Shares(blocks=0, activations=0)


def edit(file: Path, **values: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def index_of(folder: Path, **values: Any) -> None:
    edit(folder / "model.safetensors.index.json", **values)


def lead(folder: Path, away: str) -> None:
    """The index names a file that is not in the folder."""
    found = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    index_of(folder, weight_map=dict.fromkeys(found, away))


def refused(folder: Path) -> str:
    """What every door says: whole, paged, for a plan, for a measurement."""
    said = set()
    for door in (skeleton, loaded, lambda path: opened(path, ()), lambda path: opened(path, (), shares=PAGED)):
        with pytest.raises(WrongInput) as caught:
            door(str(folder))
        said.add(str(caught.value))
    (sentence,) = said
    assert "\n" not in sentence
    return sentence


@pytest.mark.parametrize(
    ("config", "name"),
    [
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "(gptq)"),
        ({"quantization_config": {"quant_method": "fp8", "weight_block_size": [16, 16]}}, "(fp8)"),
        ({"quantization_config": {"load_in_8bit": True}}, "(bitsandbytes)"),
        ({"compression_config": {"format": "int-quantized"}}, "(compression_config)"),
        ({"quantization": {"group_size": 64, "bits": 4}}, "(quantization)"),
        ({"quantization_config": "fp8"}, "(quantization_config)"),
        ({"text_config": {"quantization_config": {"quant_method": "awq"}}}, "(awq)"),
    ],
    ids=str,
)
def test_a_quantized_checkpoint_is_refused_by_name(config: dict[str, Any], name: str, saved_letters: Any) -> None:
    folder = saved_letters()
    edit(folder / "config.json", **config)
    assert f"is quantized {name}, and only plain weights" in refused(folder)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, torch.int64, torch.bool])
@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
def test_weights_in_eight_bits_are_refused_though_no_config_says_so(
    dtype: torch.dtype, file: str, saved_letters: Any
) -> None:
    folder, name = saved_letters(), "model.layers.1.mlp.up_proj.weight"
    rewrite(folder, lambda tensors: tensors.update({name: tensors[name].to(dtype)}))
    if file == "pytorch_model.bin":
        torch.save(load_file(folder / "model.safetensors"), folder / file)
        (folder / "model.safetensors").unlink()
    assert f"is quantized ({name} is " in refused_whole(folder)


@pytest.mark.parametrize("name", ["weight_scale_inv", "weight_scale", "weight_zero_point"])
def test_scales_beside_plain_weights_are_of_quantized_ones(name: str, saved_letters: Any) -> None:
    folder, name = saved_letters(), f"model.layers.1.mlp.up_proj.{name}"
    rewrite(folder, lambda tensors: tensors.update({name: torch.ones(1)}))
    assert f"is quantized ({name} is F32)" in refused(folder)


@pytest.mark.parametrize(
    ("found", "extra"),
    [
        ("q_proj.base_layer.weight", "q_proj.lora_A.default.weight"),
        ("q_proj.weight", "q_proj.lora_A.default.weight"),
        ("q_proj.weight", "q_proj.lora_magnitude_vector"),
    ],
)
@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
def test_an_adapter_that_is_not_merged_is_one_sentence(found: str, extra: str, file: str, saved_letters: Any) -> None:
    folder, at = saved_letters(), "model.layers.0.self_attn."
    rewrite(folder, lambda t: t.update({at + found: t.pop(f"{at}q_proj.weight"), at + extra: torch.ones(2)}))
    if file == "pytorch_model.bin":
        torch.save(load_file(folder / "model.safetensors"), folder / file)
        (folder / "model.safetensors").unlink()
    assert "holds an adapter and does not say for which model (model.layers.0.self_attn.q_proj." in refused_whole(
        folder
    )


def test_what_is_no_model_of_transformers_is_refused_by_its_class() -> None:
    with pytest.raises(WrongInput, match=r"a Linear is no model of transformers; give .* with adapters merged"):
        prunekit.prune(torch.nn.Linear(2, 2), object(), quiet=True)  # type: ignore[call-overload]


@pytest.mark.parametrize(
    ("stored", "asked"), [("float16", "bfloat16"), ("bfloat16", "float16"), ("float32", "float16")]
)
def test_a_dtype_that_would_round_the_weights_is_refused(stored: str, asked: str, saved_letters: Any) -> None:
    folder = saved_letters()
    rewrite(folder, lambda all_: all_.update({k: v.to(getattr(torch, stored)) for k, v in all_.items()}))
    edit(folder / "config.json", dtype=stored)
    for shares in (SHARES, PAGED):
        with pytest.raises(WrongInput, match=f"--dtype {asked} would round the weights, which are {stored}"):
            opened(str(folder), (), device="cpu", dtype=asked, shares=shares)
        assert opened(str(folder), (), device="cpu", dtype="float64", shares=shares).dtype is getattr(torch, stored)


def refused_whole(folder: Path) -> str:
    with pytest.raises(WrongInput) as caught:
        skeleton(str(folder))
    return str(caught.value)


def test_a_quantized_model_in_memory_is_refused(saved_letters: Any) -> None:
    model = AutoModelForCausalLM.from_pretrained(saved_letters())
    weight = model.model.layers[0].mlp.up_proj.weight
    model.model.layers[0].mlp.up_proj.weight = torch.nn.Parameter(weight.to(torch.int8), requires_grad=False)
    with pytest.raises(WrongInput, match=r"LlamaForCausalLM' is quantized \(.*up_proj.weight is torch.int8\)"):
        prunekit.prune(model, object(), quiet=True)


@pytest.mark.parametrize("peft", [True, False], ids=["peft", "no peft"])
@pytest.mark.parametrize("alone", [True, False], ids=["alone", "beside"])
def test_an_adapter_is_one_sentence(
    peft: bool, alone: bool, saved_letters: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = saved_letters()
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "some/base", "r": 4}))
    if alone:
        (folder / "config.json").unlink()
        (folder / "model.safetensors").unlink()
    if not peft:
        monkeypatch.setitem(sys.modules, "peft", None)
    assert "holds an adapter for 'some/base' (adapter_config.json); merge it" in refused(folder)
    (folder / "adapter_config.json").write_text("[")
    assert "does not say for which model" in refused(folder)


def test_the_weights_of_an_adapter_are_one_too(saved_letters: Any) -> None:
    folder = saved_letters()
    (folder / "adapter_model.safetensors").touch()
    assert "an adapter and does not say for which model (adapter_model.safetensors)" in refused(folder)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "generation_config.json"])
def test_a_pipe_is_not_waited_for(name: str, saved_letters: Any) -> None:
    folder = saved_letters()
    (folder / name).unlink()
    os.mkfifo(folder / name)
    assert f"{name} is a pipe or a device, which may never end" in refused(folder)


def test_a_tensor_of_another_shape_is_named(saved_letters: Any) -> None:
    folder = saved_letters()
    edit(folder / "config.json", vocab_size=7)
    for shares in (SHARES, PAGED):
        with pytest.raises(WrongInput, match=r"(embed_tokens|lm_head)\.weight is \(\d+, \d+\), and .* \(7, \d+\)"):
            opened(str(folder), (), shares=shares)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_pointer_of_git_lfs_is_named(name: str, saved_letters: Any) -> None:
    folder = saved_letters()
    (folder / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n")
    assert f"{name} is a pointer of Git LFS, not the file itself; run `git lfs pull`" in refused(folder)


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda folder: next(folder.glob("model-00002*")).unlink(), "has no model-00002-of-"),
        (lambda folder: (folder / "model.safetensors.index.json").write_text("[]"), "does not say which tensor"),
        (lambda folder: (folder / "model.safetensors.index.json").write_text("{}"), "does not say which tensor"),
        (lambda folder: (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": 1}}'), "not say"),
        (lambda folder: (folder / "model.safetensors.index.json").write_text('{"weight_map": {}}'), "not say"),
        (lambda folder: lead(folder, "/elsewhere/model.safetensors"), "not say"),
        (lambda folder: lead(folder, "../elsewhere/model.safetensors"), "not say"),
        (lambda folder: index_of(folder, metadata=None), "has no metadata, which transformers reads"),
        (lambda folder: next(folder.glob("model-00002*")).write_bytes(b"x" * 99), "cannot be read: "),
    ],
)
def test_shards_that_are_not_whole_are_named(damage: Any, says: str, saved_letters: Any) -> None:
    folder = saved_letters()
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(folder, max_shard_size="4KB")
    (folder / "model.safetensors").unlink(missing_ok=True)
    damage(folder)
    assert says in refused(folder)


def test_what_is_no_torch_checkpoint_is_named(saved_letters: Any) -> None:
    folder = saved_letters()
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"x")
    assert "pytorch_model.bin is no checkpoint that can be read" in refused_whole(folder)
    (folder / "pytorch_model.bin.index.json").write_text('{"weight_map": {"a": "gone.bin"}}')
    (folder / "pytorch_model.bin").unlink()
    assert "has no gone.bin, which its index names" in refused_whole(folder)


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ({}, r"You need to have sentencepiece or tiktoken installed"),
        ({"tokenizer.json": "{}"}, r"has no tokenizer that can be opened: \S"),
        ({"tokenizer.json": "["}, r"has no tokenizer that can be opened: .*/tokenizer.json cannot be read: Expecting"),
        ({"tokenizer.json": "[" * 10_000}, r"has no tokenizer that can be opened: \S"),
    ],
)
def test_what_a_tokenizer_lacks_is_said_with_the_advice(files: dict[str, str], says: str, saved_letters: Any) -> None:
    folder = saved_letters()
    for file in folder.glob("*token*"):
        file.unlink()
    for name, text in files.items():
        (folder / name).write_text(text)
    with pytest.raises(WrongInput, match=says) as caught:
        load_tokenizer(str(folder))
    assert "\n" not in str(caught.value)


def test_every_tensor_that_is_not_used_is_named(saved_letters: Any, capsys: pytest.CaptureFixture[str]) -> None:
    folder = saved_letters()
    rewrite(folder, lambda tensors: tensors.update({"model.layers.0.extra.weight": torch.ones(2)}))
    for shares in (SHARES, PAGED):
        warn_once.cache_clear()
        opened(str(folder), (), shares=shares)
        assert "holds model.layers.0.extra.weight, for which its model has no place" in capsys.readouterr().err


def test_a_parameter_under_two_names_is_refused(saved_letters: Any) -> None:
    folder = saved_letters()
    rewrite(folder, lambda t: t.update({"layers.0.mlp.up_proj.weight": t["model.layers.0.mlp.up_proj.weight"] + 1}))
    for shares in (SHARES, PAGED):
        with pytest.raises(WrongInput, match=r"holds model\.layers\.0\.mlp\.up_proj\.weight twice, as layers\.0"):
            opened(str(folder), (), shares=shares)


def test_a_tensor_in_two_shards_is_refused(saved_letters: Any) -> None:
    folder = saved_letters()
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(folder, max_shard_size="4KB")
    (folder / "model.safetensors").unlink()
    first, *_, last = sorted(folder.glob("*.safetensors"))
    (name, *_), there = load_file(first), load_file(last)
    save_file(there | {name: torch.zeros(2)}, last, metadata={"format": "pt"})
    assert f"holds {name} twice, in {first.name} and {last.name}; remove one" in refused(folder)


@pytest.mark.parametrize(("stored", "told"), [("bfloat16", "5 parameters in float32"), ("float32", "16 parameters in")])
def test_tensors_in_another_dtype_than_the_model_are_told(
    stored: str, told: str, saved_letters: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = saved_letters()
    rewrite(folder, lambda all_: all_.update({k: v.bfloat16() for k, v in all_.items() if "norm" not in k}))
    edit(folder / "config.json", dtype=stored)
    for shares in (SHARES, PAGED):
        warn_once.cache_clear()
        dense = opened(str(folder), (), shares=shares)
        said = " ".join(capsys.readouterr().err.split())
        assert f"holds {told}" in said
        assert f"read and written in {stored}, the dtype of the model" in said
        assert dict(dense.converted) == ({"float32": 5} if stored == "bfloat16" else {"bfloat16": 16})
    assert opened(str(saved_letters()), ()).converted == {}


# -- ties -------------------------------------------------------------------------------------------------


@pytest.fixture
def untied(saved_letters: Any) -> Path:
    """A folder whose config says that head and embedding are one, and whose file holds two."""
    folder = saved_letters(tie_word_embeddings=False)
    edit(folder / "config.json", tie_word_embeddings=True)
    return folder


def test_a_head_of_its_own_is_kept_whole_and_paged(untied: Path) -> None:
    stored = load_file(untied / "model.safetensors")
    for shares in (SHARES, PAGED):
        model: Any = opened(str(untied), (), shares=shares).model
        assert torch.equal(model.lm_head.weight, stored["lm_head.weight"])
        assert torch.equal(model.model.embed_tokens.weight, stored["model.embed_tokens.weight"])
        assert model.config.tie_word_embeddings is False
    assert opened(str(untied), ()).fingerprint == opened(str(untied), (), shares=PAGED).fingerprint
    model, _ = skeleton(str(untied))
    assert sum(p.numel() for p in model.parameters()) == sum(t.numel() for t in stored.values())


def test_a_head_of_another_shape_is_named_where_the_config_ties_it(untied: Path) -> None:
    rewrite(untied, lambda t: t.update({"lm_head.weight": torch.ones(30, 16)}))
    for shares in (SHARES, PAGED):
        with pytest.raises(WrongInput, match=r"lm_head\.weight is \(30, 16\), and its config asks for \(28, 16\)"):
            opened(str(untied), (), shares=shares)


def test_a_model_of_the_hub_keeps_its_head_whole_and_paged(
    untied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = tmp_path / "models--own--untied" / "snapshots" / ("a" * 40)
    shutil.copytree(untied, snapshot)
    (snapshot.parent.parent / "refs").mkdir()
    (snapshot.parent.parent / "refs" / "main").write_text("a" * 40)
    for place in ("huggingface_hub.constants.HF_HUB_CACHE", "transformers.utils.hub.constants.HF_HUB_CACHE"):
        monkeypatch.setattr(place, str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    stored = load_file(untied / "model.safetensors")["lm_head.weight"]
    for shares in (SHARES, PAGED):
        model: Any = opened("own/untied", (), shares=shares).model
        assert torch.equal(model.lm_head.weight, stored)
        assert model.config.tie_word_embeddings is False


def test_equal_tensors_are_tied_where_the_config_says_so(untied: Path) -> None:
    rewrite(untied, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    for shares in (SHARES, PAGED):
        model: Any = opened(str(untied), (), shares=shares).model
        assert model.lm_head.weight is model.model.embed_tokens.weight
        assert model.config.tie_word_embeddings is True


def test_a_result_has_the_head_of_its_source(untied: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "recipe": "fast",
        "pruner": "magnitude",
        "allocator": "uniform",
        "data__dataset": "python-docs",
        "data__seqlen": 16,
        "data__calibration_tokens": 64,
        "data__search_tokens": 64,
        "data__evaluation_tokens": 64,
        "quiet": True,
    }
    stored = load_file(untied / "model.safetensors")["lm_head.weight"]
    in_memory = AutoModelForCausalLM.from_pretrained(untied)
    in_memory.config.tie_word_embeddings = True
    results = [
        prunekit.prune(untied, output=tmp_path / "out", **settings),
        prunekit.prune(in_memory, load_tokenizer(str(untied)), **settings),
    ]
    assert in_memory.config.tie_word_embeddings is True  # it is not changed
    results[1].save(tmp_path / "again")
    for name, result in zip(("out", "again"), results, strict=True):
        head: Any = result.model.get_output_embeddings()
        assert torch.equal(head.weight, stored)
        assert torch.equal(load_file(tmp_path / name / "model.safetensors")["lm_head.weight"], stored)
        assert json.loads((tmp_path / name / "config.json").read_text())["tie_word_embeddings"] is False


# -- the hub ----------------------------------------------------------------------------------------------


def test_without_a_network_the_cache_is_taken_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any):
    asked = []

    def unreachable(_: Any, name: str, timeout: float) -> None:
        asked.append((name, timeout))
        raise OSError("Name or service not known")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", unreachable)
    monkeypatch.setattr(
        "huggingface_hub.try_to_load_from_cache",
        lambda repo, name: str(tmp_path / name) if repo == "owner/cached" else None,
    )
    _reached.cache_clear()
    assert at_hand("owner/cached") == at_hand("owner/cached") == str(tmp_path)
    assert asked == [("owner/cached", 10)]
    assert "the hub does not answer; owner/cached is taken from its cache" in capsys.readouterr().err
    with pytest.raises(WrongInput, match=r"'owner/other' is no folder here, and the hub does not answer"):
        at_hand("owner/other")
    _reached.cache_clear()
