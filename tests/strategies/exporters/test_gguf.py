"""GGUF: rows are reordered exactly, every part may be absent anywhere, and what no graph carries is refused."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

from prunekit import NotVerified, Order, Probe, Product, WrongInput
from prunekit.demo import MODEL
from prunekit.export.fresh import Failed
from prunekit.export.hf import save, to_transformers
from prunekit.layer.candidates import Candidate
from prunekit.layer.layouts import layout_of
from prunekit.models.adapters.find import adapter_for
from prunekit.models.opening import stored_as
from prunekit.plugins.registry import ADAPTERS
from prunekit.space.forms import parse_form
from prunekit.testing.models import tiny
from prunekit_strategies.exporters.gguf import GGUF, engine
from prunekit_strategies.exporters.gguf.carriers import EXPERTS, GRAPHS, REASONS, ROUTES, Layout, carrier
from prunekit_strategies.exporters.gguf.exporter import compare
from prunekit_strategies.exporters.gguf.reading import File, compute, rotate
from prunekit_strategies.exporters.gguf.tensors import halved, interleaved, make_entries, rope_factors, sources_of
from prunekit_strategies.exporters.gguf.vocabulary import (
    CONTROL,
    PRES,
    PROBES,
    UNUSED,
    find_difference,
    make_tokenizer,
    make_vocabulary,
)
from prunekit_strategies.exporters.gguf.writing import OWN

HEADS: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 20}
SMALL: dict[str, Any] = HEADS | {"hidden_size": 32, "num_hidden_layers": 4, "head_dim": 8, "initializer_range": 0.3}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
LINEAR = {"rope_type": "linear", "rope_theta": 1e3, "factor": 4.0}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}
ROUNDED = {"original_max_position_embeddings": 32, "beta_fast": 4.0, "beta_slow": 1.0, "truncate": True}
CARRIED: dict[str, dict[str, Any]] = {  # sizes of the tiny models that a graph with experts has
    "qwen2_moe": {"mlp_only_layers": []},
    "olmoe": {"num_key_value_heads": 6},
}
MIXTURES = sorted(name for name, route in ROUTES.items() if route.why == EXPERTS)
IDS = torch.arange(2, 50).reshape(2, 24)
ALL = 4 * ((2, 20),)  # groups of attention and neurons of the MLP that layers keep


@pytest.fixture(autouse=True)
def _without_engine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only slow tests ask it, where it is installed."""
    if request.node.get_closest_marker("slow") is None:
        monkeypatch.setattr(engine, "installed", lambda: False)


def pruned(model_type: str, kept: Any = ALL, inside: Any = "whole", **sizes: Any) -> PreTrainedModel:
    """A random model whose layers keep so many KV groups, and neurons or experts, in the class it is exported in."""
    adapter, wanted = adapter_for(model_type), dict(SMALL | {"max_position_embeddings": 64} | sizes)
    if model_type in ("smollm3", "granite"):
        wanted.pop("head_dim", None)
    model = tiny(model_type, **wanted).float().requires_grad_(False)
    for site in adapter.sites_of(model, parse_form("groups"), experts=inside):
        count = kept[site.block][site.kind != "attention"]
        weight = adapter.linear(adapter.blocks(model)[site.block], site).weight
        whole = Candidate(tuple(range(site.n_groups))[-count:] if count else (), weight)
        adapter.remove(model, site, layout_of(site).stand_in(site, count, weight) if site.experts else whole)
    return to_transformers(model, adapter)


def probe_of(model: PreTrainedModel) -> Probe:
    with torch.no_grad():
        return Probe(IDS, model(IDS, use_cache=False).logits, sum(p.numel() for p in model.parameters()))


def written(model: PreTrainedModel, folder: Path, tokenizer: Any = None, dtype: str = "f32") -> File:
    """The file of a model, which is verified."""
    exporter = GGUF(dtype)
    path = folder / exporter.place
    exporter.write(Product(model, tokenizer), path)
    exporter.verify(path, probe_of(model))
    return File.opened(path)


def byte_level(*, merges: bool = True, splits: Any = None, **changes: Any) -> PreTrainedTokenizerFast:
    """A small tokenizer of byte pairs, trained on the probes."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = splits or pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320 if merges else 256,
        initial_alphabet=alphabet,
        special_tokens=["<s>", "</s>"],
        show_progress=False,
    )
    made.train_from_iterator(PROBES, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>", **changes)


# -- rows ----------------------------------------------------------------------------------------------


def test_reordering_rows_then_rotating_neighbours_is_rotating_halves_then_reordering() -> None:
    heads, width, length = 3, 8, 5
    rows = torch.randn(heads * width, 6, dtype=torch.float64)
    x, angles = torch.randn(length, 6, dtype=torch.float64), torch.randn(length, width // 2, dtype=torch.float64)
    cos, sin = angles.cos(), angles.sin()
    theirs = rotate((x @ rows.T).unflatten(-1, (heads, width)).transpose(0, 1), cos, sin, neighbours=False)
    ours = rotate(
        (x @ interleaved(rows, heads).T).unflatten(-1, (heads, width)).transpose(0, 1), cos, sin, neighbours=True
    )
    assert torch.equal(
        ours, interleaved(theirs.movedim(-1, 1).flatten(0, 1), heads).unflatten(0, (heads, width)).movedim(1, -1)
    )
    scores = [each @ each.transpose(-1, -2) for each in (theirs, ours)]  # what attention sees
    torch.testing.assert_close(*scores, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", [(2, 4, 3), (1, 6, 1), (5, 2, 7)])
def test_reordering_is_undone_exactly_for_weights_and_biases(shape: tuple[int, int, int]) -> None:
    heads, width, other = shape
    rows = torch.arange(heads * width * other).reshape(heads * width, other)
    assert torch.equal(halved(interleaved(rows, heads), heads), rows)
    assert torch.equal(halved(interleaved(rows[:, 0], heads), heads), rows[:, 0])
    assert interleaved(rows, heads)[1].tolist() == rows[width // 2].tolist()  # row 0 of the second half


def test_rotation_is_that_of_transformers() -> None:
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    q, angles = torch.randn(1, 2, 5, 8, dtype=torch.float64), torch.randn(5, 4, dtype=torch.float64)
    twice = torch.cat([angles, angles], dim=-1)[None]
    theirs, _ = apply_rotary_pos_emb(q, q, twice.cos(), twice.sin())
    torch.testing.assert_close(rotate(q, angles.cos(), angles.sin(), neighbours=False), theirs, rtol=1e-12, atol=1e-12)


# -- layers --------------------------------------------------------------------------------------------

CASES: dict[str, tuple[str, Any, dict[str, Any], str]] = {  # family, what is kept, overrides, the architecture
    "equal": ("llama", 4 * ((1, 12),), {}, "llama"),
    "a layer lost": ("llama", ((2, 20), (0, 0), (2, 20), (2, 20)), {}, "llama"),
    "unequal": ("llama", ((1, 7), (2, 20), (2, 1), (1, 19)), {}, "deci"),
    "tied": ("llama", ((1, 7), (2, 20), (2, 1), (1, 19)), {"tie_word_embeddings": True}, "deci"),
    "biases": ("llama", ((1, 7), (2, 20), (2, 1), (1, 19)), {"attention_bias": True, "mlp_bias": True}, "deci"),
    "no first attention": ("llama", ((0, 7), (2, 20), (2, 9), (1, 19)), {}, "deci"),
    "no middle attention": ("llama", ((1, 7), (0, 20), (2, 9), (1, 19)), {}, "deci"),
    "no last attention": ("llama", ((1, 7), (2, 20), (2, 9), (0, 19)), {}, "deci"),
    "no first MLP": ("llama", ((1, 0), (2, 20), (2, 9), (1, 19)), {}, "deci"),
    "no middle MLP": ("llama", ((1, 7), (2, 0), (2, 9), (1, 19)), {}, "deci"),
    "no last MLP": ("llama", ((1, 7), (2, 20), (2, 9), (1, 0)), {}, "deci"),
    "nothing but stand-ins": ("llama", 4 * ((0, 0),), {}, "deci"),
    "no attention at all": ("llama", 4 * ((0, 3),), {}, "deci"),
    "llama3 positions": ("llama", ((1, 7), (2, 20), (2, 9), (1, 19)), {"rope_parameters": LLAMA3}, "deci"),
    "llama3 positions, equal": ("llama", ALL, {"rope_parameters": LLAMA3}, "llama"),
    "linear positions": ("mistral", ALL, {"rope_parameters": LINEAR}, "llama"),
    "mistral": ("mistral", ((1, 7), (2, 20), (2, 9), (0, 19)), {}, "deci"),
    "qwen2": ("qwen2", ((1, 7), (2, 20), (0, 9), (1, 19)), {}, "deci"),
    "qwen2, equal": ("qwen2", 4 * ((2, 11),), {"tie_word_embeddings": False}, "qwen2"),
    "qwen2, fewer heads": ("qwen2", 4 * ((1, 11),), {}, "llama"),
    "qwen3": ("qwen3", ((0, 7), (2, 20), (2, 0), (1, 19)), {"tie_word_embeddings": True}, "openelm"),
    "qwen3, equal": ("qwen3", 4 * ((1, 11),), {}, "qwen3"),
    "phi3": ("phi3", ((1, 7), (2, 20), (2, 9), (0, 19)), {}, "deci"),
    "granite": ("granite", ((1, 7), (2, 0), (2, 9), (1, 19)), {"tie_word_embeddings": True}, "deci"),
    "granite, equal": ("granite", 4 * ((2, 11),), {}, "granite"),
    "smollm3, equal": ("smollm3", 4 * ((2, 11),), {"no_rope_layer_interval": 4}, "smollm3"),
    "mixtral": ("mixtral", 4 * ((1, 3),), {}, "llama"),
    "mixtral, tied": ("mixtral", 4 * ((2, 5),), {"tie_word_embeddings": True}, "llama"),
    "qwen2_moe": ("qwen2_moe", 4 * ((2, 4),), {"mlp_only_layers": []}, "qwen2moe"),
    "qwen2_moe, tied": ("qwen2_moe", ALL, {"mlp_only_layers": [], "tie_word_embeddings": True}, "qwen2moe"),
    "qwen3_moe": ("qwen3_moe", 4 * ((1, 3),), {}, "qwen3moe"),
    "olmoe": ("olmoe", 4 * ((1, 5),), {"num_key_value_heads": 4}, "olmoe"),
    "gpt_oss": ("gpt_oss", 4 * ((1, 4),), {}, "gpt-oss"),
    "gpt_oss, yarn": ("gpt_oss", 4 * ((2, 5),), {"rope_parameters": YARN | ROUNDED}, "gpt-oss"),
    "neurons of mixtral": ("mixtral", 4 * ((2, 3),), {"inside": "neurons"}, "llama"),
    "neurons of qwen2_moe": ("qwen2_moe", 4 * ((2, 3),), {"mlp_only_layers": [], "moe_intermediate_size": 32,
                             "inside": "neurons"}, "qwen2moe"),
    "neurons of gpt_oss": ("gpt_oss", 4 * ((1, 3),), {"inside": "neurons"}, "gpt-oss"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_what_is_written_computes_what_the_model_computes(case: str, tmp_path: Path) -> None:
    family, kept, sizes, architecture = CASES[case]
    model = pruned(family, kept, **sizes)
    file = written(model, tmp_path)
    assert file.architecture == architecture
    assert compare(compute(file, IDS), probe_of(model).logits).apart < 1e-4


def test_arrays_tell_the_size_of_every_layer(tmp_path: Path) -> None:
    file = written(pruned("llama", ((1, 7), (0, 20), (2, 0), (1, 19))), tmp_path)
    assert file.get("attention.head_count") == [2, 0, 4, 2]
    assert file.get("attention.head_count_kv") == [1, 0, 2, 1]
    assert file.get("feed_forward_length") == [7, 20, 32, 19]  # of a stand-in: a graph drops layers without one
    assert not file.values("blk.2.ffn_down.weight").any()
    assert (file.get("attention.key_length"), file.get("rope.dimension_count")) == (8, 8)


def test_the_first_layer_always_has_attention_and_equal_layers_one_number(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    file = written(pruned("llama", ((0, 7), *ALL[1:])), tmp_path / "one")
    assert file.get("attention.head_count") == [1, 4, 4, 4]
    assert not file.values("blk.0.attn_output.weight").any()
    assert written(pruned("llama", 4 * ((1, 5),)), tmp_path).get("feed_forward_length") == 5


def test_values_are_those_of_the_folder_bit_for_bit(tmp_path: Path) -> None:
    model = stored_as(pruned("phi3", ((1, 7), (2, 20), (2, 9), (0, 19))), torch.bfloat16)
    save(model, tmp_path)
    exporter = GGUF(dtype="f32")
    path = tmp_path / exporter.place
    exporter.write(Product(model), path)
    probe = probe_of(stored_as(copy.deepcopy(model), torch.float32))
    exporter.verify(path, probe)
    file, layout = File.opened(path), Layout.of(model.config)
    names = [name for name, _ in model.named_parameters()]
    for entry in make_entries(layout, file.architecture, names):
        for piece, values in sources_of(entry, file.values(entry.name)):
            if piece.source:
                wanted = model.get_parameter(piece.source)[slice(*piece.rows)].float()
                assert torch.equal(values, wanted), entry.name
    with torch.no_grad():  # one bit of a value that hardly matters, in the folder
        model.model.layers[0].mlp.down_proj.weight[0, 0] *= 1 + 2**-7
    for each in tmp_path.glob("*.safetensors"):
        each.unlink()
    save(model, tmp_path)
    with pytest.raises(NotVerified, match=r"blk.0.ffn_down.weight .* is not model.layers.0.mlp.down_proj.weight"):
        exporter.verify(path, probe)


def test_the_output_is_written_once_where_it_is_tied(tmp_path: Path) -> None:
    for tied in (True, False):
        (tmp_path / str(tied)).mkdir()
        file = written(pruned("llama", tie_word_embeddings=tied), tmp_path / str(tied))
        assert ("output.weight" in file.tensors) != tied


def test_a_sliding_window_ends_the_context(tmp_path: Path) -> None:
    model = pruned("mistral", sliding_window=48, max_position_embeddings=64)
    assert written(model, tmp_path).get("context_length") == 48


def test_factors_of_llama3_positions_are_those_of_transformers() -> None:
    layout = Layout.of(pruned("llama", rope_parameters=LLAMA3).config)
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    wanted, _ = ROPE_INIT_FUNCTIONS["llama3"](layout.config, torch.device("cpu"))
    plain = 1 / LLAMA3["rope_theta"] ** (np.arange(0, 8, 2) / 8)
    factors = rope_factors(layout)
    assert factors is not None
    np.testing.assert_allclose(plain / factors, wanted.numpy(), rtol=1e-6)
    assert {1.0, 8.0} <= {*np.round(factors, 4).tolist()}  # some frequencies stay, some are divided by the factor


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "gpt_oss"])
def test_names_of_tensors_are_those_of_the_gguf_package(name: str, tmp_path: Path) -> None:
    file = written(pruned(name, **CASES[name][2]), tmp_path)
    arch = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == file.architecture)
    known = {gguf.TENSOR_NAMES[each].format(bid=0) for each in gguf.MODEL_TENSORS[arch]}
    assert {
        each.rpartition(".")[0] for each in file.tensors if not each.startswith(("blk.1", "blk.2", "blk.3"))
    } <= known
    sizes = {"expert_count": 6, "expert_used_count": 2}
    assert {key: file.get(key) for key in sizes} == sizes
    router = file.tensors["blk.0.ffn_gate_inp.weight"]
    assert (router.shape, file.tensors["blk.0.ffn_down_exps.weight"].shape[:2]) == ((6, 32), (6, 32))


def test_matrices_of_experts_are_compared_with_those_of_the_folder(tmp_path: Path) -> None:
    model = pruned("gpt_oss", 4 * ((1, 4),))
    save(model, tmp_path)
    file = written(model, tmp_path)
    with torch.no_grad():
        model.get_parameter("model.layers.0.mlp.experts.gate_up_proj")[1, 0, 1] *= 1 + 2**-20
    for each in tmp_path.glob("*.safetensors"):
        each.unlink()
    save(model, tmp_path)
    with pytest.raises(
        NotVerified, match=r"blk.0.ffn_up_exps.weight .* is not model.layers.0.mlp.experts.gate_up_proj"
    ):
        GGUF("f32").verify(file.path, probe_of(model))


@pytest.mark.parametrize("dtype", ["f16", "q8_0"])
def test_routers_and_biases_are_stored_in_float32(dtype: str, tmp_path: Path) -> None:
    file = written(pruned("gpt_oss", 4 * ((2, 4),), intermediate_size=32, initializer_range=0.1), tmp_path, dtype=dtype)
    kinds = {name.partition("blk.1.")[2]: tensor.kind.name.lower() for name, tensor in file.tensors.items()}
    assert kinds["ffn_down_exps.weight"] == kinds["ffn_gate_exps.weight"] == dtype
    exact = ("ffn_gate_inp.weight", "ffn_gate_inp.bias", "ffn_up_exps.bias", "attn_q.bias", "attn_sinks.weight")
    assert {kinds[name] for name in exact} == {"f32"}


# -- types ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [each for each in OWN if each != "f32"])
def test_smaller_types_diverge_little(dtype: str, tmp_path: Path) -> None:
    model = pruned("llama", ((1, 7), (2, 32), (2, 9), (1, 64)), intermediate_size=64)
    file = written(model, tmp_path, dtype=dtype)
    parity = compare(compute(file, IDS), probe_of(model).logits)
    assert 0 < parity.divergence < 0.02
    kinds = {name: tensor.kind.name for name, tensor in file.tensors.items()}
    assert kinds["blk.1.ffn_down.weight"].lower() == dtype
    assert kinds["blk.0.ffn_down.weight"].lower() == ("f16" if dtype == "q8_0" else dtype)  # rows of 7
    assert kinds["blk.0.attn_norm.weight"] == "F32"


def test_what_is_too_large_or_not_finite_is_not_written(tmp_path: Path) -> None:
    model = pruned("llama")
    weight = model.get_parameter("model.layers.1.mlp.up_proj.weight")
    for value, dtype, said in (
        (
            7e4,
            "f16",
            r"model.layers.1.mlp.up_proj.weight in float16: it holds 7e\+04; give exporters.gguf.dtype bf16 or f32",
        ),
        (float("nan"), "f32", "up_proj.weight: it holds values that are not finite"),
        (float("inf"), "bf16", "up_proj.weight: it holds values that are not finite"),
    ):
        weight.data[3, 3] = value
        with pytest.raises(WrongInput, match=said):
            GGUF(dtype=dtype).write(Product(model), tmp_path / "model.gguf")
        assert not [*tmp_path.iterdir()], "what was begun is not left there"


def test_a_type_that_nobody_writes_is_no_option() -> None:
    with pytest.raises(ValueError, match=r"dtype is one of f32, f16, bf16, q8_0, q2_k.* not 'q9'"):
        GGUF(dtype="q9")


# -- families ------------------------------------------------------------------------------------------


def order_of(
    model_type: str, *, settled: bool = False, units: Any = "groups", spared: tuple[Any, ...] = (), **sizes: Any
) -> Order:
    adapter, sizes = adapter_for(model_type), CARRIED.get(model_type, {}) | sizes
    model = adapter.opened(tiny(model_type, **sizes)) if model_type != "smollm3" else tiny(model_type, **sizes)
    return Order(adapter, units, "import", config=model.config, settled=settled, spared=frozenset(spared))


@pytest.mark.parametrize("model_type", sorted(ADAPTERS))
def test_every_family_is_carried_or_refused_with_a_reason(model_type: str) -> None:
    assert (model_type in ROUTES) != (model_type in REASONS)
    order = order_of(model_type)
    if model_type in REASONS:
        with pytest.raises(WrongInput, match=r"gguf cannot carry \w+: .+; exporter hf writes it, and where all layers"):
            GGUF().check(order)
        return
    if model_type in ("olmoe", "qwen2_moe"):
        with pytest.raises(WrongInput, match=r"fewer heads: .* keep attention whole with spare.kinds=\[attention\]"):
            GGUF(equal=True).check(order)
        order = order_of(model_type, spared=("attention",))
    GGUF(equal=True).check(order)
    GGUF().check(order_of(model_type, units="weights"))
    if model_type in MIXTURES:
        with pytest.raises(WrongInput, match=r"one number of heads, of experts .*: prune with allocator uniform and"):
            GGUF().check(order)
    elif model_type == "smollm3":
        with pytest.raises(WrongInput, match="layers without rotation; with equal layers it can: prune with allocator"):
            GGUF().check(order)
    elif model_type == "qwen3":
        with pytest.raises(
            WrongInput, match=r"output is not tied to its embeddings.*give exporters.gguf.equal=true; or exporter hf"
        ):
            GGUF().check(order)
        GGUF().check(order_of("qwen3", tie_word_embeddings=True))
    else:
        GGUF().check(order)


def test_the_table_of_families_says_what_is_carried() -> None:
    text = (Path(__file__).parents[3] / "docs" / "families.md").read_text(encoding="utf-8")
    table = text.partition("## GGUF")[2].partition("## ")[0]
    rows = {cells[1].strip(" `"): cells[2:4] for line in table.splitlines() if len(cells := line.split("|")) == 5}
    assert rows.keys() >= {*ADAPTERS}
    for name in ADAPTERS:
        equal, unequal = rows[name]
        if name in REASONS:
            assert (equal.strip(), unequal.strip()) == (f"refused: {REASONS[name]}", "refused")
        else:
            assert f"`{ROUTES[name].equal}`" in equal
            assert f"`{ROUTES[name].unequal}`" in unequal or "refused" in unequal


def test_a_family_of_others_is_refused() -> None:
    config: Any = copy.copy(tiny("llama").config)
    config.model_type = "somebody's"
    with pytest.raises(WrongInput, match="gguf cannot carry somebody's: its graph is not among those that are known"):
        GGUF().check(Order(adapter_for("llama"), "groups", "import", config=config))


@pytest.mark.parametrize(
    ("model_type", "sizes", "said"),
    [
        ("llama", {"hidden_act": "gelu"}, "with hidden_act gelu: the graphs have silu"),
        ("phi3", {"partial_rotary_factor": 0.5, "rope_parameters": {"rope_theta": 1e4, "rope_type": "default"}},
         "heads rotate only 0.5 of their width"),
        ("llama", {"rope_parameters": YARN}, "positions of type yarn"),
        ("qwen3", {"rope_parameters": LLAMA3, "tie_word_embeddings": True}, "rotary positions of type llama3"),
        ("qwen3", {"attention_bias": True, "tie_word_embeddings": True}, "with attention_bias: openelm has none"),
        ("qwen2_moe", {"mlp_only_layers": [1]}, "some layers have an MLP and no experts"),
        ("qwen3_moe", {"decoder_sparse_step": 2}, "some layers have an MLP and no experts"),
        ("qwen2_moe", {"norm_topk_prob": True}, "norm_topk_prob True: llama.cpp's graph has False"),
        ("qwen3_moe", {"norm_topk_prob": False}, "norm_topk_prob False: llama.cpp's graph has True"),
        ("qwen3_moe", {"attention_bias": True}, "attention_bias: llama.cpp's graph has none"),
        ("olmoe", {"clip_qkv": 3.0}, "clip_qkv: llama.cpp's graph has none"),
        ("olmoe", {"num_key_value_heads": 3}, "6 query heads that share 3 KV heads"),
        ("gpt_oss", {"layer_types": ["full_attention", "sliding_attention", "full_attention"]}, "every second layer"),
        ("gpt_oss", {"swiglu_limit": 5.0}, r"swiglu_limit other than \(1.702, 7.0\)"),
    ],
)  # fmt: skip
def test_settings_that_no_graph_has_are_refused_before_any_work(
    model_type: str, sizes: dict[str, Any], said: str
) -> None:
    with pytest.raises(WrongInput, match=f"{said}.*exporter hf writes it"):
        GGUF().check(order_of(model_type, **sizes))


def test_positions_that_the_engine_rounds_are_refused_where_all_is_exact(tmp_path: Path) -> None:
    settings = YARN | ROUNDED | {"truncate": False}
    order = order_of("gpt_oss", rope_parameters=settings)
    with pytest.raises(WrongInput, match=r"exactly: llama.cpp rounds where the ramp of YaRN begins and ends; give"):
        GGUF("f32", equal=True).check(order)
    GGUF(equal=True).check(order)
    file = written(pruned("gpt_oss", 4 * ((1, 4),), rope_parameters=settings), tmp_path, dtype="f16")
    assert file.get("rope.scaling.type") == "yarn"


def test_unequal_experts_are_refused_when_they_are_there(tmp_path: Path) -> None:
    config = pruned("mixtral", ((2, 3), (2, 4), (2, 4), (2, 4))).config
    with pytest.raises(WrongInput, match=r"whose layers differ in size: the graphs of llama.cpp with experts take one"):
        GGUF(equal=True).write(Product(pruned("mixtral", ((1, 4), *(3 * ((2, 4),))))), tmp_path / "model.gguf")
    with pytest.raises(WrongInput, match="whose layers differ in size"):
        GGUF().check(Order(adapter_for("mixtral"), "groups", "import", config=config, settled=True))
    fewer = pruned("qwen2_moe", 4 * ((1, 4),), mlp_only_layers=[]).config
    with pytest.raises(WrongInput, match=r"fewer heads: .*spare.kinds=\[attention\]"):
        GGUF().check(Order(adapter_for("qwen2_moe"), "groups", "import", config=fewer, settled=True))


def test_what_is_there_already_is_checked_by_its_own_sizes() -> None:
    equal = Order(adapter_for("qwen3"), "groups", "import", config=pruned("qwen3").config, settled=True)
    GGUF().check(equal)
    unequal = pruned("qwen3", ((1, 7), *ALL[1:])).config
    with pytest.raises(WrongInput, match="not tied"):
        GGUF().check(Order(adapter_for("qwen3"), "groups", "import", config=unequal, settled=True))


def test_a_broken_promise_of_equal_layers_is_noticed(tmp_path: Path) -> None:
    with pytest.raises(WrongInput, match="not tied"):
        GGUF(equal=True).write(Product(pruned("qwen3", ((1, 7), *ALL[1:]))), tmp_path / "model.gguf")
    model = pruned("smollm3", ((2, 20), (0, 0), (2, 20), (2, 20)), no_rope_layer_interval=4)
    with pytest.raises(WrongInput, match="every layer but each 4th rotates, which is not so where layers were dropped"):
        GGUF(equal=True).write(Product(model), tmp_path / "model.gguf")


def test_biases_that_a_graph_has_not_are_refused() -> None:
    layout = Layout.of(pruned("qwen3").config)
    with pytest.raises(WrongInput, match=r"a bias of attn_output: llama.cpp's graph qwen3 has none; leave recovery"):
        carrier(layout, {"attn_output"})
    assert carrier(Layout.of(pruned("qwen2", 4 * ((2, 11),)).config), {"ffn_down"}) == "llama"
    assert all(graph.biases <= GRAPHS["deci"].biases for graph in GRAPHS.values())


def test_without_the_engine_its_types_are_refused_in_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "installed", lambda: False)
    with pytest.raises(
        WrongInput, match=r"q4_k_m is written by llama.cpp's own quantizer, which is not installed: pip"
    ):
        GGUF(dtype="q4_k_m").check(order_of("llama"))


# -- files ---------------------------------------------------------------------------------------------


def test_a_file_is_never_replaced(tmp_path: Path) -> None:
    path = tmp_path / GGUF().place
    path.write_bytes(b"mine")
    with pytest.raises(FileExistsError, match="is there already; move it away"):
        GGUF().write(Product(pruned("llama")), path)
    assert path.read_bytes() == b"mine"
    assert [*tmp_path.iterdir()] == [path]


def test_what_an_interrupted_export_has_left_is_its_own(tmp_path: Path) -> None:
    for name in (".model-f16.gguf", ".model-f16.gguf.source", "model-f16.gguf", "other.gguf"):
        (tmp_path / name).touch()
    assert {file.name for file in GGUF().files(tmp_path)} == {*(f.name for f in tmp_path.iterdir())} - {"other.gguf"}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda b: b[: len(b) // 2], "cannot be read|ends before"),
        (lambda b: b"GGML" + b[4:], "cannot be read: it begins with b'GGML', version 3"),
        (lambda b: b"", "cannot be read"),
        (lambda b: b.replace(b"blk.1.ffn_up", b"blk.1.ffn_uq"), "holds blk.1.ffn_uq.weight of shape .* does not have"),
        (lambda b: b.replace(b"general.architecture", b"general.architectura"), "has the architecture None"),
        (lambda b: b.replace(b"deci.feed_forward_length", b"deci.feed_forward_lengtx"), "sizes of its layers"),
    ],
)
def test_a_damaged_file_is_noticed(change: Any, said: str, tmp_path: Path) -> None:
    model = pruned("llama", ((1, 7), (2, 20), (2, 9), (1, 19)))
    path = written(model, tmp_path).path
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(NotVerified, match=said):
        GGUF(dtype="f32").verify(path, probe_of(model))


def test_a_file_is_read_as_the_gguf_package_reads_it(tmp_path: Path) -> None:
    model = pruned("llama", ((1, 7), (2, 20), (2, 9), (0, 19)), vocab_size=400)
    file = written(model, tmp_path, byte_level(chat_template="{{ messages }} ü"), "q8_0")
    theirs = gguf.GGUFReader(file.path)
    fields = {name: field.contents() for name, field in theirs.fields.items() if not name.startswith("GGUF.")}
    assert file.fields == fields
    assert file.tensors.keys() == {tensor.name for tensor in theirs.tensors}
    for tensor in theirs.tensors:
        found = torch.from_numpy(gguf.dequantize(np.array(tensor.data), tensor.tensor_type))
        assert torch.equal(file.values(tensor.name), found.reshape(file.tensors[tensor.name].shape))


def test_rows_in_the_wrong_order_are_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("prunekit_strategies.exporters.gguf.tensors.interleaved", lambda rows, heads: rows)
    with pytest.raises(NotVerified, match="computes something else than the model that was judged"):
        written(pruned("llama"), tmp_path)


# -- tokenizers ----------------------------------------------------------------------------------------


def isolated(*patterns: str) -> Any:
    parts = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns]
    return pre_tokenizers.Sequence([*parts, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


@pytest.mark.parametrize("name", PRES)
def test_rules_are_found_by_what_they_are(name: str) -> None:
    splits, whole = PRES[name]
    tokenizer = byte_level(splits=isolated(*splits))
    if whole:
        rules = json.loads(tokenizer.backend_tokenizer.to_str())
        rules["model"]["ignore_merges"] = True
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(rules)))
    found = make_vocabulary(tokenizer, 400)
    assert found.pre == name
    ours = make_tokenizer(found)
    for text in PROBES:
        assert ours(text) == tokenizer.encode(text, add_special_tokens=False)


def test_digits_one_by_one_are_rules_of_their_own() -> None:
    splits = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)])
    assert make_vocabulary(byte_level(splits=splits), 400).pre == "smollm"


def test_the_vocabulary_of_the_demo_is_read_back(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    model = pruned("llama", vocab_size=2048)
    file = written(model, tmp_path, tokenizer)
    back = file.vocabulary()
    assert back == make_vocabulary(tokenizer, 2048)
    assert (back.model, back.pre, len(back.tokens)) == ("gpt2", "gpt-2", 2048)
    assert find_difference(back, lambda text: tokenizer.encode(text, add_special_tokens=False)) is None


def test_special_tokens_ends_and_the_chat_template_are_carried(tmp_path: Path) -> None:
    tokenizer = byte_level(chat_template="{{ messages }}")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|call|>"]})  # type: ignore[dict-item]
    tokenizer.add_tokens(["<tool>"])
    model = pruned("llama", vocab_size=400)
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, 7]  # type: ignore[assignment]
    back = written(model, tmp_path, tokenizer).vocabulary()
    assert back.special == {"bos": 0, "eos": 1, "eot": 7}
    assert (back.add_bos, back.add_eos, back.template) == (False, False, "{{ messages }}")
    kinds = dict(zip(back.tokens, back.types, strict=True))
    assert (kinds["<|call|>"], kinds["<tool>"], kinds["<s>"]) == (CONTROL, 4, CONTROL)


def test_bos_is_added_where_the_tokenizer_adds_it() -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = byte_level()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing("<s> $A </s>", None, [("<s>", 0), ("</s>", 1)])
    found = make_vocabulary(tokenizer, 400)
    assert (found.add_bos, found.add_eos) == (True, True)


def test_holes_in_a_vocabulary_are_unused_tokens() -> None:
    rules = json.loads(byte_level().backend_tokenizer.to_str())
    last = max(rules["model"]["vocab"], key=rules["model"]["vocab"].get)
    rules["model"]["vocab"][last] += 40  # behind forty ids that nothing has
    hole = max(sorted(rules["model"]["vocab"].values())[:-1]) + 1
    found = make_vocabulary(PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(rules))), 400)
    assert found.tokens[hole] == f"[UNUSED{hole}]"
    assert {found.types[index] for index in (*range(hole, hole + 39), 399)} == {UNUSED}
    assert len({*found.tokens}) == len(found.tokens) == 400


@pytest.mark.parametrize(
    ("tokenizer", "said"),
    [
        (lambda: byte_level(merges=False), "this one has no merges"),
        (lambda: PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, "a"))), "model Word"),
        (object, "a tokenizer with a tokenizer.json, not object"),
        (lambda: byte_level(splits=pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel()])),
         "does not know the rules by which this tokenizer splits a text; give exporters.gguf.pre"),
    ],
)  # fmt: skip
def test_a_tokenizer_that_llama_cpp_does_not_know_is_refused(tokenizer: Any, said: str) -> None:
    with pytest.raises(WrongInput, match=said):
        make_vocabulary(tokenizer(), 400)
    config = pruned("llama", vocab_size=400).config
    with pytest.raises(WrongInput, match=said):  # before any work
        GGUF().check(Order(adapter_for("llama"), "groups", "import", config=config, tokenizer=tokenizer()))


def test_a_wrong_name_of_rules_is_noticed_on_the_probes() -> None:
    with pytest.raises(
        WrongInput, match=r"by the rules of smollm in llama.cpp .* becomes .*; give exporters.gguf.pre another name"
    ):
        make_vocabulary(byte_level(), 400, pre="smollm")


def test_text_that_is_changed_before_it_is_split_is_refused() -> None:
    tokenizer = byte_level()
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    with pytest.raises(WrongInput, match=r"changes a text before it splits it \(Lowercase\)"):
        make_vocabulary(tokenizer, 400)


def test_more_tokens_than_embeddings_are_refused() -> None:
    with pytest.raises(WrongInput, match="with id 319: the model has 300 embeddings"):
        make_vocabulary(byte_level(), 300)


PIECES = ("the cat sat on the mat, the hat; that cat", "then there they sat at the hat of that cat")


def by_pieces() -> PreTrainedTokenizerFast:
    """A tokenizer as transformers makes of a SentencePiece model: merges over whole texts, bytes for the unknown."""
    made = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=330, special_tokens=tokens, show_progress=False)
    made.train_from_iterator(PIECES, trainer)
    rules = json.loads(made.to_str())
    rules["added_tokens"] = rules["added_tokens"][:3]
    made = Tokenizer.from_str(json.dumps(rules))
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def test_pieces_with_scores_are_those_of_ordered_merges() -> None:
    tokenizer = by_pieces()
    found = make_vocabulary(tokenizer, 340)
    assert (found.model, found.add_space) == ("llama", True)
    assert found.types[3:259] == 256 * (6,)
    ours = make_tokenizer(found)
    for text in (*PIECES, *PROBES):
        assert ours(text) == tokenizer.encode(text, add_special_tokens=False)


def test_another_tokenizer_beside_a_file_is_noticed(tmp_path: Path) -> None:
    model, tokenizer = pruned("llama", vocab_size=400), byte_level()
    file = written(model, tmp_path, tokenizer)
    tokenizer.save_pretrained(tmp_path)
    GGUF("f32").verify(file.path, probe_of(model))
    byte_level(splits=isolated(*PRES["smollm"][0])).save_pretrained(tmp_path)
    with pytest.raises(NotVerified, match=r"makes \[.*\] of .*, not \["):
        GGUF("f32").verify(file.path, probe_of(model))


# -- engine --------------------------------------------------------------------------------------------

with_engine = pytest.mark.skipif(not engine.installed(), reason="llama-cpp-python is not installed")


@with_engine
@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_llama_cpp_computes_the_same(case: str, tmp_path: Path) -> None:
    family, kept, sizes, _ = CASES[case]
    model: Any = pruned(family, kept, **({"max_position_embeddings": 256} | sizes))
    file = written(model, tmp_path)
    ids = (torch.arange(192)[None] * 7) % 61
    with torch.no_grad():
        wanted = model(ids, use_cache=False).logits
    parity = compare(engine.compute_logits(file.path, ids), wanted)
    assert parity.apart < 5e-3
    prompt, greedy = ids[:, :20], {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    theirs = model.generate(prompt, attention_mask=torch.ones_like(prompt), **greedy)[0, 20:]
    assert engine.generate(file.path, prompt[0].tolist(), 8) == theirs.tolist()


@with_engine
@pytest.mark.slow
@pytest.mark.parametrize("name", PRES)
def test_llama_cpp_splits_texts_by_the_rules_of_that_name(name: str, tmp_path: Path) -> None:
    splits, whole = PRES[name]
    rules = json.loads(byte_level(splits=isolated(*splits)).backend_tokenizer.to_str())
    rules["model"]["ignore_merges"] = whole
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(rules)), bos_token="<s>")
    file = written(pruned("llama", vocab_size=400), tmp_path, tokenizer)
    wanted = [tokenizer.encode(text, add_special_tokens=False) for text in PROBES]
    assert engine.tokenize(file.path, PROBES) == wanted


@with_engine
@pytest.mark.slow
def test_llama_cpp_joins_pieces_by_their_scores(tmp_path: Path) -> None:
    tokenizer = by_pieces()
    file = written(pruned("llama", vocab_size=340), tmp_path, tokenizer)
    texts = [*PIECES, *PROBES]
    assert engine.tokenize(file.path, texts) == [tokenizer.encode(text, add_special_tokens=False) for text in texts]


@with_engine
@pytest.mark.slow
def test_the_engine_writes_k_quants_of_unequal_layers(tmp_path: Path) -> None:
    sizes = {"hidden_size": 256, "head_dim": 64, "intermediate_size": 320, "initializer_range": 0.05}
    model = pruned("llama", ((1, 256), (2, 97), (0, 320), (2, 0)), **sizes)
    file = written(model, tmp_path, dtype="q4_k_m")
    assert "Q4_K" in {tensor.kind.name for tensor in file.tensors.values()}
    assert [each.name for each in tmp_path.iterdir()] == ["model-q4_k_m.gguf"]


@with_engine
@pytest.mark.slow
def test_speed_and_a_chat_are_answered(tmp_path: Path) -> None:
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    file = written(pruned("llama", vocab_size=400), tmp_path, byte_level(chat_template=template))
    speeds = engine.measure(file.path, prompt=32, new=4, rounds=2)
    assert min(speeds.prefill, speeds.decode) > 0
    assert isinstance(engine.chat(file.path, [{"role": "user", "content": "the cat"}], new=4), str)


def fake_engine(monkeypatch: pytest.MonkeyPatch, codes: dict[bool, int]) -> list[tuple[str, bool]]:
    """An engine that ends with these codes, by whether weights are as they are stored; what it is asked."""
    asked = list[tuple[str, bool]]()

    def ask(_: str, __: Any, arguments: list[Any], **___: Any) -> Any:
        stored = json.loads(arguments[2])["stored"]
        asked.append((arguments[1], stored))
        if codes[stored]:
            raise Failed("", codes[stored])
        return {"tokens": [1]}, {}

    monkeypatch.setattr("prunekit.export.fresh.ask_fresh", ask)
    monkeypatch.setattr(engine, "_runs", {})
    return asked


def test_an_engine_that_crashes_with_weights_laid_out_for_a_processor_is_asked_with_them_as_stored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    asked, file = fake_engine(monkeypatch, {False: -11, True: 0}), tmp_path / "model.gguf"
    assert engine.generate(file, [1, 2], 1) == [1]
    assert asked == [("generate", False), ("generate", True)]
    assert "laid out for this processor" in caplog.text
    caplog.clear()
    engine.generate(file, [1, 2], 1)  # it is known now
    engine.open_timer(file)
    assert asked[2:] == [("generate", True)]
    assert not caplog.text


def test_a_file_is_tried_in_another_process_before_it_is_timed_in_this_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = fake_engine(monkeypatch, {False: 0, True: 0})
    engine.open_timer(tmp_path / "model.gguf")
    assert asked == [("generate", False)]


@pytest.mark.parametrize(
    ("codes", "times"), [({False: -9, True: 0}, 1), ({False: 1, True: 0}, 1), ({False: -11, True: -11}, 2)]
)
def test_what_ends_an_engine_otherwise_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, codes: dict[bool, int], times: int
) -> None:
    asked = fake_engine(monkeypatch, codes)
    with pytest.raises(engine.EngineFailed, match=rf"cannot run .*model.gguf: it ended with code {codes[times > 1]}"):
        engine.generate(tmp_path / "model.gguf", [1, 2], 1)
    assert len(asked) == times
