"""A model that is given what it does not know is told of, before the work; one on its own kind of text is not."""

import math
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from prunekit.data import python_docs
from prunekit.data.tokens import TokenBatch
from prunekit.demo import MODEL
from prunekit.measure.fit import doubts, expected_bits
from prunekit.recipe.resolve import resolve
from prunekit.recipe.schema import Recipe
from prunekit.report.document import count
from prunekit.run.session import Job, open_session
from prunekit.system.progress import Progress


@pytest.fixture(scope="module")
def known() -> tuple[Any, Any, TokenBatch]:
    """The bundled model, its tokenizer, and text of the kind it was trained on."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    ids = tokenizer.encode(python_docs.text("test")[:20_000], add_special_tokens=False, verbose=False)
    batch = TokenBatch(torch.tensor(ids[:4_096]).reshape(32, 128), "docs")
    return AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32), tokenizer, batch


def told(known: tuple[Any, Any, TokenBatch], ids: torch.Tensor, origins: tuple[str, ...] = ()) -> list[str]:
    model, tokenizer, _ = known
    return doubts(model, tokenizer, TokenBatch(ids, "text", origins), count(model))


def test_the_expected_bits_are_those_of_the_published_law() -> None:
    nats = 1.69 + 406.4 / 70e9**0.34  # of Chinchilla's size
    assert expected_bits(70_000_000_000) == pytest.approx(nats / (4.48 * math.log(2)))
    assert expected_bits(10**6) > expected_bits(10**8) > expected_bits(10**12) > 1.69 / (4.48 * math.log(2))


def test_text_that_a_model_knows_is_not_told_of(known: tuple[Any, Any, TokenBatch]) -> None:
    ids = known[2].ids
    assert told(known, ids) == []
    begun = ids.clone()
    begun[:, 0] = 0
    assert told(known, begun) == []


def test_shuffled_tokens_and_those_of_another_tokenizer_are_told_of(known: tuple[Any, Any, TokenBatch]) -> None:
    ids, generator = known[2].ids, torch.Generator().manual_seed(0)
    shuffled = ids.flatten()[torch.randperm(ids.numel(), generator=generator)].reshape(ids.shape)
    renamed = torch.randperm(2048, generator=generator)[ids]
    for wrong in (shuffled, renamed):
        (line,) = told(known, wrong)
        assert line.startswith("warning: the dense model does not know the text of text: it needs ")
        assert "models of 1.9 million parameters about 1.5" in line


def test_of_several_sources_the_one_is_named_that_does_not_fit(known: tuple[Any, Any, TokenBatch]) -> None:
    ids = known[2].ids
    mixed = torch.stack([ids, ids.flip(0, 1)], 1).flatten(0, 1)
    (line,) = told(known, mixed, ("forwards", "backwards") * len(ids))
    assert "does not know the text of backwards" in line


def test_a_model_whose_loss_is_no_number_is_told_of(known: tuple[Any, Any, TokenBatch]) -> None:
    model, tokenizer, batch = known
    broken = deepcopy(model)
    broken.model.norm.weight.data.fill_(math.nan)
    assert doubts(broken, tokenizer, batch, count(model))


def test_short_windows_and_few_tokens_say_nothing(known: tuple[Any, Any, TokenBatch]) -> None:
    backwards = known[2].ids.flip(0, 1)
    assert told(known, backwards[:4])
    assert told(known, backwards[:3]) == []
    assert told(known, backwards.reshape(-1, 32)) == []


class Heard(Progress):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, line: str) -> None:
        self.lines.append(line)


def test_a_run_says_so_before_it_begins(tmp_path: Path, saved_letters: Callable[..., Path]) -> None:
    text, asked = tmp_path / "text.txt", {"sparsity": 0.5, "device": "cpu", "data__dataset": str(tmp_path / "text.txt")}
    asked |= {"data__seqlen": 64} | {f"data__{part}_tokens": 512 for part in ("calibration", "search", "evaluation")}
    generator = torch.Generator().manual_seed(0)
    text.write_text(bytes(torch.randint(97, 123, (9_000,), generator=generator).tolist()).decode())
    said = []
    for name in (MODEL, saved_letters()):  # the second is so small that nothing is expected of it
        heard = Heard()
        recipe = Recipe.load("fast").with_overrides({key.replace("__", "."): value for key, value in asked.items()})
        open_session(resolve(recipe.with_overrides({"model": str(name)})), Job(progress=heard))
        said.append([line for line in heard.lines if line.startswith("warning: the dense model does not know")])
    assert [len(lines) for lines in said] == [1, 0]
