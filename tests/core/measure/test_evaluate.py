import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

import prunekit
from prunekit.data.draws import draw_evaluation
from prunekit.data.spec import DataSpec
from prunekit.data.tokens import TokenBatch
from prunekit.demo import MODEL
from prunekit.errors import WrongInput
from prunekit.measure import perplexity as module
from prunekit.measure import speed
from prunekit.measure.evaluate import check_causal, evaluate, load
from prunekit.measure.perplexity import bits_per_byte, perplexity
from prunekit.measure.speed import size
from prunekit.models.opening import skeleton
from prunekit.space.prices import Workload
from prunekit.system.progress import Progress


class Bigrams(nn.Module):
    """Row t of the table is what follows token t."""

    def __init__(self, table: list[list[float]]) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.tensor(table))
        self.config = SimpleNamespace(vocab_size=len(table))

    def forward(self, input_ids: torch.Tensor, use_cache: bool) -> SimpleNamespace:
        return SimpleNamespace(logits=self.table[input_ids])


class Said(Progress):
    """Keeps the lines."""

    def __init__(self) -> None:
        self.lines = list[str]()

    def say(self, line: str) -> None:
        self.lines.append(line)


def batch(*windows: list[int]) -> TokenBatch:
    return TokenBatch(torch.tensor(windows), "toy")


def llama(**more: object) -> Any:
    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    return LlamaForCausalLM(LlamaConfig(**(sizes | heads | more)))  # type: ignore[arg-type]


# p(next | 0) = (1/2, 1/2), p(next | 1) = (1/4, 3/4)
BIGRAMS = Bigrams([[0.0, 0.0], [0.0, math.log(3)]])


def test_perplexity_by_hand() -> None:
    found = perplexity(BIGRAMS, batch([0, 1, 0], [1, 1, 1]))
    losses = [(math.log(2) + math.log(4)) / 2, math.log(4 / 3)]
    nll = sum(losses) / 2
    assert found.losses == pytest.approx(losses)
    assert found.nll == pytest.approx(nll)
    assert found.value == pytest.approx(math.exp(nll))
    assert found.standard_error == pytest.approx(abs(losses[0] - losses[1]) / 2)
    assert (found.windows, found.label) == (2, "ppl/toy/seq3/n2/float32")


def test_the_first_token_of_a_window_is_not_a_target() -> None:
    assert perplexity(BIGRAMS, batch([0, 1])).nll == pytest.approx(math.log(2))
    assert perplexity(BIGRAMS, batch([1, 1])).nll == pytest.approx(math.log(4 / 3))


def test_batches_and_chunks_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokens = (
        llama().eval(),
        TokenBatch(torch.randint(50, (7, 12), generator=torch.Generator().manual_seed(0)), "toy"),
    )
    whole = perplexity(model, tokens, batch_size=7)
    monkeypatch.setattr(module, "ROWS_AT_ONCE", 150)  # three rows
    assert perplexity(model, tokens, batch_size=2).losses == pytest.approx(whole.losses)
    with torch.no_grad():
        assert whole.nll == pytest.approx(float(model(input_ids=tokens.ids, labels=tokens.ids).loss), rel=1e-5)


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_what_is_not_finite_is_infinitely_bad(broken: float) -> None:
    found = perplexity(Bigrams([[broken, 0.0], [0.0, 0.0]]), batch([0, 1, 0], [1, 1, 1]))
    assert found.value == math.inf
    assert math.isnan(found.standard_error)


def test_a_huge_loss_does_not_overflow() -> None:
    found = perplexity(Bigrams([[0.0, -2e4], [0.0, 0.0]]), batch([0, 1]))
    assert (found.value, found.nll) == (math.inf, pytest.approx(2e4))


def test_the_rise_over_dense_is_paired() -> None:
    worse = Bigrams([[0.0, 0.0], [0.0, 0.0]])
    windows = batch([1, 1, 1], [1, 1, 1], [1, 1, 1])
    rise, error = perplexity(worse, windows).above(perplexity(BIGRAMS, windows))
    assert rise == pytest.approx(math.log(2) - math.log(4 / 3))
    assert error == pytest.approx(0, abs=1e-7)
    with pytest.raises(ValueError, match="not the same measurement"):
        perplexity(worse, windows).above(perplexity(BIGRAMS, batch([1, 1])))


def test_training_mode_is_given_back() -> None:
    model = llama(attention_dropout=0.5).train()
    perplexity(model, batch([1, 2, 3]))
    assert model.training


def test_tied_parameters_count_once_and_bytes_are_those_on_disk(tmp_path: Path) -> None:
    model = llama(tie_word_embeddings=True).to(torch.bfloat16)
    untied = llama(tie_word_embeddings=False)
    assert size(untied).parameters - size(model).parameters == 50 * 16
    assert size(model).bytes == 2 * size(model).parameters
    model.save_pretrained(tmp_path)
    assert size(model, tmp_path).bytes == (tmp_path / "model.safetensors").stat().st_size


def test_a_checkpoint_that_lacks_weights_is_not_made_up(tmp_path: Path) -> None:
    model = llama(tie_word_embeddings=False)
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.layers.0.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(WrongInput, match=r"lacks model\.layers\.0\.mlp\.up_proj\.weight; it is not whole"):
        load(str(tmp_path))


def test_a_model_that_is_pruned_as_another_is_measured_as_it_is(tmp_path: Path) -> None:
    model = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_positions=64, n_embd=16, n_layer=1, n_head=2)).eval()
    model.save_pretrained(tmp_path)
    read = load(str(tmp_path), device="cpu")
    assert type(read) is type(model)
    assert perplexity(read, batch([1, 2, 3])) == perplexity(model, batch([1, 2, 3]))


def saved(name: str, path: Path, **more: Any) -> Any:
    """A tiny model of a family that prunekit does not prune, with the tokenizer of the demo beside it."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(name, vocab_size=2048, bos_token_id=1, eos_token_id=1, pad_token_id=1, **more)
    model = AutoModelForCausalLM.from_config(config).eval()
    model.save_pretrained(path)
    AutoTokenizer.from_pretrained(MODEL).save_pretrained(path)
    return model


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("data") / "prose.txt"
    file.write_text("The quick brown fox jumps over the lazy dog. " * 60)
    return file


@pytest.fixture
def _timed_shortly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "workload", lambda _: Workload(1, 4, 2))
    monkeypatch.setattr(speed, "SECONDS", 0)


GPT = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64}
OTHERS = {
    "bloom": {"hidden_size": 16, "n_layer": 2, "n_head": 2},
    "gptj": GPT | {"rotary_dim": 4},
    "openai-gpt": GPT,
    "nemotron": {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
                 "num_key_value_heads": 1},
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_a_family_that_is_not_pruned_is_measured(name: str, tmp_path: Path, text: Path) -> None:
    model = saved(name, tmp_path, **OTHERS[name])
    with pytest.raises(WrongInput, match=f"model type '{name}' has no adapter"):
        skeleton(str(tmp_path))
    said = Said()
    data = DataSpec(dataset=str(text), seqlen=16, evaluation_tokens=64)
    found = evaluate(str(tmp_path), data, device="cpu", progress=said)
    tokens = draw_evaluation(AutoTokenizer.from_pretrained(tmp_path), data)
    assert found["nll"] == pytest.approx(perplexity(model, tokens).nll, rel=1e-6)
    timed = name != "openai-gpt"  # which has no cache
    assert ("decode_tokens_per_second" in found) == timed
    assert any("speed is not measured: it keeps no cache" in line for line in said.lines) != timed


def test_a_checkpoint_of_any_family_must_be_whole(tmp_path: Path) -> None:
    saved("bloom", tmp_path, **OTHERS["bloom"])
    weights = load_file(tmp_path / "model.safetensors")
    del weights["transformer.h.0.mlp.dense_4h_to_h.weight"]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(WrongInput, match=r"lacks transformer\.h\.0\.mlp\.dense_4h_to_h\.weight; it is not whole"):
        load(str(tmp_path))


def test_a_tokenizer_that_is_made_up_is_none(tmp_path: Path, text: Path) -> None:
    saved("gptj", tmp_path, **OTHERS["gptj"])
    for file in tmp_path.glob("*token*"):
        file.unlink()
    with pytest.raises(WrongInput, match="has no tokenizer: there is no vocabulary"):
        evaluate(str(tmp_path), DataSpec(dataset=str(text), seqlen=16, evaluation_tokens=64), device="cpu")


def test_code_of_any_family_runs_where_the_caller_allows_it(tmp_path: Path) -> None:
    saved("bloom", tmp_path, **OTHERS["bloom"])
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Model"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "own.py").write_text("raise SystemExit('it ran')")
    with pytest.raises(WrongInput, match="comes with code of its own, which runs only where the caller allows it"):
        load(str(tmp_path))


def test_what_reads_ahead_is_no_language_model(tmp_path: Path, text: Path) -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    saved("bert", tmp_path, max_position_embeddings=64, initializer_range=0.5, **sizes)
    with pytest.raises(WrongInput, match="is not causal: a later token changes what it predicts before"):
        evaluate(str(tmp_path), DataSpec(dataset=str(text), seqlen=16, evaluation_tokens=64), device="cpu")
    check_causal(llama().eval(), batch([1, 2, 3, 4]), "llama")


class Letters:
    """One token per letter."""

    def decode(self, ids: list[int], **_: object) -> str:
        return "".join(map(chr, ids))


def test_bits_per_byte_do_not_hang_on_tokens() -> None:
    found = perplexity(BIGRAMS, batch([0, 1, 0, 1]))  # log 2, log 4, log 2 nats
    bits = (1 + 2 + 1) / 3
    assert bits_per_byte(found, batch([97, 98, 97, 98]), Letters()) == pytest.approx(bits)  # a byte for a token
    assert bits_per_byte(found, batch([228, 228, 228, 228]), Letters()) == pytest.approx(bits / 2)  # ä has two
    mixed = TokenBatch(torch.tensor([[97, 97], [228, 228]]), "a+b", ("a", "b"))
    assert bits_per_byte(found, mixed, Letters()) == pytest.approx(bits * 4 / 6)


def test_the_bytes_are_those_of_the_text() -> None:
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    text = "Grüße, naïve façade: 東京 → π ≈ 3.14159\n" * 20
    ids = torch.tensor([tokenizer.encode(text)])
    found = perplexity(BIGRAMS, batch([0, 1]))
    expected = found.nll / math.log(2) * ids.numel() / len(text.encode())
    assert bits_per_byte(found, TokenBatch(ids, "text"), tokenizer) == pytest.approx(expected)


@pytest.mark.usefixtures("_timed_shortly")
def test_a_second_model_is_judged_on_the_same_text(text: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(MODEL)
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    with pytest.raises(WrongInput, match="a model in memory needs its tokenizer"):
        prunekit.evaluate(model, dataset=text, seqlen=16, tokens=64, quiet=True)
    found = prunekit.evaluate(model, tokenizer, against=MODEL, dataset=text, seqlen=16, tokens=64, quiet=True)
    assert found["against"]["perplexity"] == pytest.approx(found["perplexity"], rel=1e-2)  # of bfloat16 and float32
    assert abs(found["against"]["nll_rise"]) < 0.01
    assert found["against"]["bits_per_byte"] == pytest.approx(found["bits_per_byte"], rel=1e-2)


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        ({"model": "./gone"}, "there is no model folder './gone'"),
        ({"model": "."}, "is not a model that can be opened"),
        ({"device": "gpu"}, "no device 'gpu'"),
        ({"dtype": "float12"}, "no dtype 'float12'; there are auto"),
    ],
)
def test_wrong_input_is_one_sentence(
    more: dict[str, str], sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(WrongInput) as caught:
        evaluate(**({"model": ".", "data": DataSpec()} | more))  # type: ignore[arg-type]
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)
