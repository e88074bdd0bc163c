import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from prunekit.data.spec import DataSpec
from prunekit.data.tokens import TokenBatch
from prunekit.errors import WrongInput
from prunekit.measure import perplexity as module
from prunekit.measure.evaluate import evaluate, load
from prunekit.measure.perplexity import perplexity
from prunekit.measure.speed import size


class Bigrams(nn.Module):
    """Row t of the table is what follows token t."""

    def __init__(self, table: list[list[float]]) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.tensor(table))
        self.config = SimpleNamespace(vocab_size=len(table))

    def forward(self, input_ids: torch.Tensor, use_cache: bool) -> SimpleNamespace:
        return SimpleNamespace(logits=self.table[input_ids])


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
