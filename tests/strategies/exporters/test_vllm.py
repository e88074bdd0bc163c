"""vLLM: it finds our classes in every process, every layer asks it for attention, and what it says is read rightly."""

from __future__ import annotations

import json
import os
import signal
import socket
import stat
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from typer.testing import CliRunner

import prunekit as pk
from prunekit.cli.main import app
from prunekit.demo import MODEL
from prunekit.export.compare import compare
from prunekit.export.formats import formats_in, why_not_run
from prunekit.export.fresh import python_of
from prunekit.export.hf import save, to_transformers
from prunekit.export.record import Record
from prunekit.layer.layouts import layout_of
from prunekit.models import serving
from prunekit.models.adapters.find import adapter_for
from prunekit.models.classes import FAMILIES, SERVED, define
from prunekit.plugins.adapter import Inside
from prunekit.plugins.registry import ADAPTERS
from prunekit.space.forms import parse_form
from prunekit.testing import tiny
from prunekit.testing.exporters import record_of
from prunekit.testing.models import EXPERTS, HYBRIDS, SIZES
from prunekit_strategies.exporters.vllm import VLLM, engine
from prunekit_strategies.exporters.vllm.exporter import REFUSED, WHOLE

VARIABLE = VLLM.engine_python
IDS = torch.randint(61, (2, 24), generator=torch.Generator().manual_seed(0))
LOST: dict[tuple[int, str], int] = {(0, "attention"): 0, (1, "attention"): 1, (0, "mlp"): 7, (2, "mlp"): 0}
LOST |= {(1, "experts"): 3}


def pruned(model_type: str, keep: dict[tuple[int, str], int] = LOST, experts: Inside = "whole", **sizes: Any) -> Any:
    """Layers of unequal sizes: the first has no attention, the last no MLP."""
    model, adapter = tiny(model_type, **sizes).float(), adapter_for(model_type)
    for site in adapter.sites_of(model, parse_form("groups"), experts=experts):
        weight = adapter.linear(adapter.blocks(model)[site.block], site).weight.detach()
        count = max(site.least, min(site.n_groups, keep.get((site.block, site.kind), site.n_groups)))
        adapter.remove(model, site, layout_of(site).stand_in(site, count, weight))
    return to_transformers(model, adapter).eval().requires_grad_(False)


def record_of_model(model: Any, ids: torch.Tensor = IDS) -> Record:
    parameters = sum(p.numel() for p in model.parameters())
    return record_of(pk.Product(model), pk.Probe(ids, model(ids, use_cache=False).logits, parameters))


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A model of unequal layers, and its folder with a record."""
    model, folder = pruned("llama"), tmp_path_factory.mktemp("served")
    VLLM().write(pk.Product(model), folder)
    record_of_model(model).write(folder)
    return model, folder


# -- the plug-in of vLLM --------------------------------------------------------------------------------


def test_vllm_finds_the_classes_by_the_entry_point_however_often_it_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    early, now = ModuleType("transformers"), sys.modules["transformers"]  # as whoever came first holds it
    monkeypatch.setitem(sys.modules, serving.REGISTRY, SimpleNamespace(transformers=early))
    for family in FAMILIES.values():  # whatever was there comes back
        monkeypatch.setattr(now, define(family)[2].__name__, None, raising=False)
    (ours,) = entry_points(group="vllm.general_plugins", name="prunekit")
    call = ours.load()
    assert call is serving.register
    for _ in range(2):  # vLLM calls it in every process, and some processes are forks
        call()
        for family in FAMILIES.values():
            config, base, causal = define(family)
            assert getattr(now, causal.__name__) is getattr(early, causal.__name__) is causal
            sizes: dict[str, Any] = {"per_layer_config": {}}
            sizes = sizes if family.text is None else {"text_config": sizes}
            assert AutoConfig.for_model(f"prunekit_{family.model_type}", **sizes).__class__ is config
            assert AutoModel._model_mapping[config] is base  # type: ignore[attr-defined]
            assert getattr(now, family.autos[2])._model_mapping[config] is causal
    assert find_spec("vllm") is not None or "vllm" not in sys.modules


def test_the_name_in_a_config_is_that_of_a_class_that_transformers_then_has(served: tuple[Any, Path]) -> None:
    serving.register([FAMILIES["llama"]])
    (name,) = json.loads((served[1] / "config.json").read_text())["architectures"]
    causal: Any = getattr(sys.modules["transformers"], name)
    assert issubclass(causal, PreTrainedModel)
    assert causal.is_backend_compatible() or causal._can_set_attn_implementation()  # else vLLM does not take it


def test_factors_of_logits_are_found_by_the_name_that_vllm_has_for_them() -> None:
    config = AutoConfig.for_model("prunekit_granite", logits_scaling=4.0, per_layer_config={})
    assert config.logit_scale == 0.25
    assert "logit_scale" not in config.to_dict()
    assert AutoConfig.for_model("prunekit_cohere", logit_scale=0.5, per_layer_config={}).logit_scale == 0.5


@pytest.mark.parametrize("model_type", ["llama", "phi3"])
def test_every_layer_asks_the_engine_once_for_as_many_heads_as_its_config_says(
    model_type: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, asked = pruned(model_type), list[tuple[int, int, int]]()
    expected = model(IDS, use_cache=False).logits

    def attend(module: nn.Module, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Any, **how: Any) -> Any:
        asked.append((int(module.layer_idx), q.shape[1], k.shape[1]))  # type: ignore[arg-type]
        how["is_causal"] = True
        return sdpa_attention_forward(module, q, k, v, None, **how)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, SERVED, attend)
    model.config._attn_implementation = SERVED
    found = model(IDS, use_cache=False).logits
    sizes = [(c.num_attention_heads, c.num_key_value_heads) for c in model.config.per_layer_config]
    assert asked == [(index, *heads) for index, heads in enumerate(sizes)]
    assert sizes[0] == (1, 1)  # removed
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


# -- the exporter ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", [*ADAPTERS])
def test_what_vllm_cannot_serve_is_refused_before_any_work_with_the_reason(model_type: str) -> None:
    adapter = adapter_for(model_type)
    order = pk.Order(adapter, "groups", "import")
    if (why := REFUSED.get(model_type)) is not None:
        with pytest.raises(pk.WrongInput, match=rf"format 'vllm' cannot write \w+ models of unequal layers: {why}"):
            VLLM().check(order)
        VLLM(equal=True).check(replace(order, spared=frozenset({"attention", "mixer", "mlp"})))
        VLLM().check(pk.Order(adapter, "weights", "import"))
        VLLM().check(pk.Order(adapter, "groups", "import", config=AutoConfig.for_model(model_type), settled=True))
    elif adapter.images:
        for equal in (False, True):
            with pytest.raises(
                pk.WrongInput, match="format 'vllm' writes language models, and this one takes images, t"
            ):
                VLLM(equal=equal).check(order)
    elif getattr(adapter, "family", None) is None:
        with pytest.raises(pk.WrongInput, match="format 'vllm' writes models with attention, not Mamba"):
            VLLM().check(order)
    else:
        VLLM().check(order)


def test_fewer_heads_are_refused_where_vllm_has_no_way_to_run_them() -> None:
    adapter, sentence = adapter_for("lfm2"), "with fewer heads: vLLM's own class takes the width of a head from hidden"
    with pytest.raises(pk.WrongInput, match=sentence):  # before they go
        VLLM(equal=True).check(pk.Order(adapter, "groups", "import", config=AutoConfig.for_model("lfm2")))
    for keep, refused in ((EQUAL, True), (MLPS, False)):  # and after
        config = for_vllm("lfm2", keep).config
        assert config.model_type == "lfm2"
        order = pk.Order(adapter, "groups", "import", config=config, settled=True)
        with pytest.raises(pk.WrongInput, match=sentence) if refused else nullcontext():
            VLLM().check(order)


def test_falcon_is_served_with_all_its_heads_and_neurons_alone() -> None:
    adapter, sentence = adapter_for("falcon"), "Falcon models with fewer heads or neurons: vLLM's own class takes the "
    whole = AutoConfig.for_model("falcon")
    narrow = AutoConfig.for_model("falcon", ffn_hidden_size=2 * whole.hidden_size)
    spared = pk.Order(adapter, "groups", "import", config=whole, spared=frozenset({"attention"}))
    for order in (
        pk.Order(adapter, "groups", "import", config=narrow, settled=True),
        pk.Order(adapter, "weights", "import", config=narrow),
    ):
        with pytest.raises(pk.WrongInput, match=sentence):
            VLLM().check(order)
    with pytest.raises(pk.WrongInput, match=sentence):  # before they go
        VLLM(equal=True).check(spared)
    VLLM().check(pk.Order(adapter, "weights", "import", config=whole))


def test_a_broken_promise_of_equal_layers_writes_nothing(tmp_path: Path) -> None:
    with pytest.raises(pk.WrongInput, match="of unequal layers"):
        VLLM(equal=True).write(pk.Product(pruned("falcon")), tmp_path)
    assert [*tmp_path.iterdir()] == []


def test_neurons_of_experts_are_one_number_or_refused(tmp_path: Path) -> None:
    one = LOST | {(block, "mlp"): 1 for block in range(3)}
    model = pruned("mixtral", one, "neurons")
    VLLM().write(pk.Product(model), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["intermediate_size"] == 8, "vLLM reads this one, and no number by layer"
    assert all("intermediate_size" not in layer for layer in config["per_layer_config"].values())
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(loaded(IDS).logits, model(IDS).logits, rtol=0, atol=1e-5)
    several = pruned("mixtral", {(1, "mlp"): 1}, "neurons")
    order = pk.Order(adapter_for("mixtral"), "groups", "import", config=several.config, settled=True)
    for refused in (lambda: VLLM().check(order), lambda: VLLM().write(pk.Product(several), tmp_path / "other")):
        with pytest.raises(pk.WrongInput, match="whose experts have 8 to 16 neurons by layer: vLLM reads one number"):
            refused()
    assert not (tmp_path / "other").exists()


def test_every_family_has_a_row_in_the_table() -> None:
    text = (Path(__file__).parents[3] / "docs/families.md").read_text(encoding="utf-8").partition("## vLLM")[2]
    rows = {line.split("`")[1]: line for line in text.splitlines() if line.startswith("| `")}
    rows.pop("model_type")
    families = {name for name in ADAPTERS if getattr(adapter_for(name), "family", None) is not None}
    assert rows.keys() == families
    images = {name for name in families if adapter_for(name).images}
    assert {name for name, row in rows.items() if "refused" in row} == REFUSED.keys() | images
    assert all(why in rows[name] for name, why in REFUSED.items())


@pytest.mark.parametrize(
    ("model_type", "way"), [("qwen2", "TransformersForCausalLM"), ("qwen2_moe", "TransformersMoEForCausalLM")]
)
def test_equal_layers_take_another_road_where_vllms_own_class_counts_heads_otherwise(
    model_type: str, way: str, tmp_path: Path
) -> None:
    fewer = {(block, "attention"): 2 for block in range(3)}  # of three groups, so that 4 heads of 4 are not 24
    model = pruned(model_type, fewer)
    VLLM().write(pk.Product(model), tmp_path / "fewer")
    config = json.loads((tmp_path / "fewer/config.json").read_text())
    assert (config["model_type"], config["architectures"]) == (model_type, [way])
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "fewer").eval()
    torch.testing.assert_close(loaded(IDS).logits, model(IDS).logits, rtol=0, atol=1e-5)
    whole = pruned(model_type, {})
    VLLM().write(pk.Product(whole), tmp_path / "all")
    assert json.loads((tmp_path / "all/config.json").read_text())["architectures"] == [type(whole).__name__]


def test_the_folder_of_a_result_is_run_by_two_engines_and_asked_of_one(served: tuple[Any, Path]) -> None:
    assert [*formats_in(served[1])] == ["hf"]
    assert [*formats_in(served[1], engine="vllm")] == ["vllm"]
    assert [*formats_in(served[1], [{"name": "vllm"}])] == ["vllm", *([] if find_spec("vllm") else ["hf"])]


def test_a_missing_engine_is_one_sentence_with_what_to_install(
    served: tuple[Any, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("prunekit.export.formats.find_spec", lambda _: None)
    monkeypatch.delenv(VARIABLE, raising=False)

    def refused() -> str:
        done = CliRunner().invoke(app, ["verify", str(served[1]), "--engine", "vllm"])
        assert done.exit_code == 2, done.output
        return done.stderr.strip().splitlines()[-1]

    sentence = "engine 'vllm' needs vllm, which is not installed: pip install \"vllm\", here or where "
    assert f"{sentence}{VARIABLE} names a Python" in refused()
    other = tmp_path / "python"  # one that finds nothing
    other.write_text("#!/bin/sh\necho vllm\n")
    other.chmod(other.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv(VARIABLE, str(other))
    assert python_of(VARIABLE) == str(other)
    assert sentence in refused()
    other.write_text("#!/bin/sh\nexit 1\n")
    assert "which does not run Python" in refused()
    monkeypatch.setenv(VARIABLE, str(tmp_path / "nothing"))
    assert f"{VARIABLE} is '{tmp_path / 'nothing'}', which is no program" in refused()


# -- the engine, with a vLLM that is pretended ----------------------------------------------------------


class SamplingParams(SimpleNamespace):
    """What a caller asks for; what it does not name is nothing."""

    def __getattr__(self, name: str) -> None:
        return None


class LLM:
    """As vLLM answers, on transformers: what stands before every token of the prompt, then what was made."""

    def __init__(self, model: str, **settings: Any) -> None:
        self.settings, self.asked = settings, list[Any]()
        self.model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
        self.llm_engine = SimpleNamespace(model_config=SimpleNamespace(get_vocab_size=lambda: 61))

    def generate(self, prompts: Any, how: Any, use_tqdm: bool) -> list[Any]:
        return [self._one(prompt["prompt_token_ids"], how) for prompt in prompts]

    @torch.no_grad()
    def _one(self, ids: list[int], how: Any) -> Any:
        assert len(ids) + how.max_tokens <= self.settings["max_model_len"]
        made, text = [], list(ids)
        for _ in range(how.max_tokens):
            logprobs = self.model(torch.tensor([text]), use_cache=False).logits[0].log_softmax(-1)
            made.append(int(logprobs[-1].argmax()))
            text.append(made[-1])
        whole = self.model(torch.tensor([ids]), use_cache=False).logits[0].log_softmax(-1)
        told = [
            self._told(row, following, how.logprobs or 1)
            for row, following in zip(whole, [*ids[1:], None], strict=True)
        ]
        output = SimpleNamespace(token_ids=made, logprobs=[told[-1]])
        return SimpleNamespace(prompt_logprobs=[None, *told[:-1]], outputs=[output])

    def _told(self, row: torch.Tensor, following: int | None, count: int) -> dict[int, Any]:
        tokens = {*row.topk(count).indices.tolist(), *([] if following is None else [following])}
        return {token: SimpleNamespace(logprob=float(row[token])) for token in tokens}


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> None:
    module: Any = ModuleType("vllm")
    module.LLM, module.SamplingParams = LLM, SamplingParams
    monkeypatch.setitem(sys.modules, "vllm", module)
    monkeypatch.setattr(os, "environ", dict(os.environ))


@pytest.mark.usefixtures("pretended")
@pytest.mark.parametrize("likeliest", [20, 3])
def test_what_vllm_says_is_put_where_it_was_asked(
    served: tuple[Any, Path], likeliest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "LIKELIEST", likeliest)
    record = Record.read(served[1])
    assert record is not None
    asked = {"ids": record.inquiry.ids, "tokens": record.inquiry.tokens, "prompt": record.inquiry.prompt}
    told, found = engine.answer(asked, str(served[1]), str(record.inquiry.new_tokens))
    response = pk.Response(**found, **told)
    rows = compare(record, response, VLLM().tolerance(served[1]))
    assert [row.what for row in rows if row.agrees] == [
        "parameters", "tensors in the files", "log-probabilities", "likeliest tokens", "greedy tokens"
    ]  # fmt: skip
    untold = response.logprobs.isnan()
    assert not untold[..., 0:likeliest].any()  # the next token of the text is always told, and the likeliest
    assert bool(untold.any()) == (likeliest < 8)


@pytest.mark.usefixtures("pretended")
@pytest.mark.parametrize(("model_type", "left"), [("lfm2", ["-rotary_embedding"]), ("llama", None)])
def test_a_kernel_that_computes_something_else_is_left_out(
    model_type: str, left: list[str] | None, tmp_path: Path
) -> None:
    pruned(model_type, {}).save_pretrained(tmp_path)
    how = engine.opened(str(tmp_path), 8, enforce_eager=True).settings.get("compilation_config")
    assert how == (left and {"custom_ops": left})


@pytest.mark.usefixtures("pretended")
@pytest.mark.parametrize(
    ("model_type", "on_cpu", "dtype"),
    [("qwen3_next", True, "bfloat16"), ("qwen3_next", False, "float32"), ("llama", True, "float32")],
)
def test_what_vllm_computes_in_bfloat16_alone_is_asked_in_it(
    model_type: str, on_cpu: bool, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Opened(Exception):
        pass

    def opened(path: str, length: int, **how: Any) -> None:
        raise Opened(how["dtype"])

    platforms: Any = ModuleType("vllm.platforms")
    platforms.current_platform = SimpleNamespace(is_cpu=lambda: on_cpu)
    monkeypatch.setitem(sys.modules, "vllm.platforms", platforms)
    monkeypatch.setattr(engine, "opened", opened)
    AutoConfig.for_model(model_type).save_pretrained(tmp_path)
    asked = {"ids": IDS, "tokens": IDS[..., None], "prompt": IDS[0]}
    with pytest.raises(Opened, match=f"^{dtype}$"):
        engine.answer(asked, str(tmp_path), "1")
    assert VLLM().tolerance(tmp_path) == (0.8 if model_type == "qwen3_next" else 1e-4)


@pytest.mark.usefixtures("pretended")
def test_another_model_is_told_apart(served: tuple[Any, Path]) -> None:
    record = record_of_model(pruned("llama", seed=1))
    asked = {"ids": record.inquiry.ids, "tokens": record.inquiry.tokens, "prompt": record.inquiry.prompt}
    told, found = engine.answer(asked, str(served[1]), "0")
    rows = compare(record, pk.Response(**found, **told), VLLM().tolerance(served[1]))
    assert "log-probabilities" in [row.what for row in rows if row.agrees is False]


def test_speed_is_taken_in_a_process_of_its_own_again_and_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "vllm.py").write_text(
        "import time\n"
        "from types import SimpleNamespace as N\n"
        "class SamplingParams(N): pass\n"
        "class LLM:\n"
        "    def __init__(self, **how):\n"
        "        print('vLLM says something')\n"
        "        self.llm_engine = N(model_config=N(get_vocab_size=lambda: 61))\n"
        "    def generate(self, prompts, how, use_tqdm):\n"
        "        assert [len(p['prompt_token_ids']) for p in prompts] == [5, 5]\n"
        "        time.sleep(0.001 * how.max_tokens)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    run = engine.Timer(tmp_path, sys.executable)
    for _ in range(2):
        read, made = run(2, 5, 20)
        assert read >= 1e6
        assert made >= 1e7
    (tmp_path / "vllm.py").write_text("raise ImportError('broken')")
    with pytest.raises(RuntimeError, match=r"vLLM ended while .* was timed"):
        engine.Timer(tmp_path, sys.executable)(2, 5, 20)


def test_why_it_failed_is_the_last_error_that_it_named() -> None:
    said = "INFO 11-29\n  File x\nValueError: Layer 0 is odd\n[rank0] bye"
    assert engine.cause_of(said) == "ValueError: Layer 0 is odd"
    assert engine.cause_of("[rank0]: RuntimeError: it is too long\nLoading: 0%") == "RuntimeError: it is too long"
    assert engine.cause_of("killed") == "killed"
    assert engine.cause_of("") == "it ended without a word"


# -- the engine itself ----------------------------------------------------------------------------------


MLPS = {(block, kind): few for block in range(3) for kind, few in (("mlp", 8), ("experts", 4))}  # of 17, of six
EQUAL = MLPS | {(block, "attention"): 2 for block in range(3)}  # of three groups
NEURONS = LOST | {(block, "mlp"): 1 for block in range(3)}  # in experts; of two groups
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "truncate": False,
}
AS_RELEASED: dict[str, dict[str, Any]] = {  # what vLLM's own classes read, as configs of released models have it
    "gpt_oss": {"rope_parameters": YARN | {"beta_fast": 32.0, "beta_slow": 1.0}},
    "lfm2": {"conv_dim": 192, "block_dim": 192},
    "falcon": {"ffn_hidden_size": 768},
    "qwen3_next": {"linear_key_head_dim": 64, "linear_value_head_dim": 64},
}
CASES: dict[str, tuple[str, dict[tuple[int, str], int], Any]] = {
    **{name: (name, LOST, "import") for name in (*SIZES, *EXPERTS) if name not in REFUSED},
    "llama, bundled": ("llama", LOST, "bundled"),
    "mixtral, neurons": ("mixtral", NEURONS, "import"),
    **{f"{name}, equal": (name, EQUAL, "import") for name in (*SIZES, *EXPERTS, *HYBRIDS) if name not in WHOLE},
    "lfm2, equal": ("lfm2", MLPS, "import"),
    "falcon, dense": ("falcon", {}, "import"),
}


def for_vllm(
    model_type: str, keep: dict[tuple[int, str], int], experts: Inside = "whole", seed: int = 0, **sizes: Any
) -> Any:
    """With heads of 32, for which there are kernels."""
    named = (SIZES | EXPERTS | HYBRIDS)[model_type]
    sizes |= AS_RELEASED.get(model_type, {})
    sizes |= {"hidden_size": 192} | {name: 32 for name in ("head_dim", "query_pre_attn_scalar") if name in named}
    sizes |= {name: 0.08 for name in ("initializer_range", "init_std") if name in named}
    return pruned(model_type, keep, experts, seed=seed, **sizes)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_vllm_answers_what_the_judged_network_does(case: str, tmp_path: Path) -> None:
    if (why := why_not_run(VLLM())) is not None:
        pytest.skip(why)
    model_type, keep, code = CASES[case]
    model = for_vllm(model_type, keep, "neurons" if keep is NEURONS else "whole")
    VLLM().write(pk.Product(model, code=code), tmp_path)
    record = record_of_model(model)
    rows = compare(record, VLLM().answers(tmp_path, record.inquiry), VLLM().tolerance(tmp_path))
    assert [row for row in rows if row.agrees is not True] == []
    if case == "llama":
        other = record_of_model(for_vllm(model_type, keep, seed=1))
        rows = compare(other, VLLM().answers(tmp_path, other.inquiry), VLLM().tolerance(tmp_path))
        assert "log-probabilities" in [row.what for row in rows if row.agrees is False]


@contextmanager
def server_of(folder: Path, log: Path) -> Iterator[Callable[..., Any]]:
    """The server of vLLM on a folder, with its engine in a process of its own, as what asks it by HTTP."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = {name: value for name, value in engine.SETTINGS.items() if name.startswith("VLLM_CPU")}
    command = [python_of(VARIABLE), "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)]
    command += ["--served-model-name", "small", "--host", "127.0.0.1", "--port", str(port)]
    with log.open("w") as said:
        process = subprocess.Popen(
            [*command, "--dtype", "float32", "--enforce-eager"],
            env=os.environ | engine.OFFLINE | settings, cwd=log.parent, stdout=said, stderr=said,
            start_new_session=True,
        )  # fmt: skip

    def ask(path: str, **what: Any) -> Any:
        body = json.dumps({"model": "small", "temperature": 0, "ignore_eos": True, "return_token_ids": True} | what)
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", body.encode(), headers)
        with urllib.request.urlopen(request, timeout=300) as reply:
            return json.load(reply)

    try:
        while True:
            assert process.poll() is None, log.read_text()[-4000:]
            with suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                break
            time.sleep(1)
        yield ask
    finally:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@pytest.mark.slow
def test_the_server_of_vllm_completes_and_chats_over_http(tmp_path: Path) -> None:
    if (why := why_not_run(VLLM())) is not None:
        pytest.skip(why)
    tokenizer, folder = AutoTokenizer.from_pretrained(MODEL), tmp_path / "small"
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}def "
    model = for_vllm("llama", LOST, vocab_size=len(tokenizer))
    VLLM().write(pk.Product(model, tokenizer), folder)

    def continued(ids: list[int]) -> list[int]:
        how = {"max_new_tokens": 16, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        return model.generate(torch.tensor([ids]), **how)[0, len(ids) :].tolist()

    text, turns = "import os\n\n", [{"role": "user", "content": "read a file"}]
    ids = tokenizer(text)["input_ids"]
    with server_of(folder, tmp_path / "log") as ask:
        (whole,) = ask("/v1/completions", prompt=text, max_tokens=16)["choices"]
        chat = ask("/v1/chat/completions", messages=turns, max_tokens=16)
    assert whole["prompt_token_ids"] == ids
    assert whole["token_ids"] == continued(ids)
    assert whole["text"] == tokenizer.decode(whole["token_ids"])
    asked = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert chat["prompt_token_ids"] == asked
    assert chat["choices"][0]["token_ids"] == continued(asked)


@pytest.mark.slow
def test_what_vllm_does_not_load_is_not_verified(served: tuple[Any, Path], tmp_path: Path) -> None:
    if (why := why_not_run(VLLM())) is not None:
        pytest.skip(why)
    model, _ = served
    save(model, tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(pk.NotVerified, match=r"vLLM does not run .*Error"):
        VLLM().answers(tmp_path, record_of_model(model).inquiry)
