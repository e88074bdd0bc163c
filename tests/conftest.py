"""Every test: one thread, so that workers do not fight for cores and sums have one order; no network; the same draws.

And what several files need: small models on disk, and runs that are killed.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from itertools import count
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)

# what is drawn at random belongs to `make random`: a change should not fail by another one's luck
settings.register_profile("fixed", derandomize=True, deadline=None, database=None)
settings.register_profile("random", max_examples=300, deadline=None, print_blob=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fixed"))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--write-golden", action="store_true", help="measure the numbers of tests/golden.json anew")


@pytest.fixture(scope="session")
def saved_tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A tiny Llama, its config overridden at will, with the tokenizer of the demo, in a folder of its own."""
    from transformers import AutoTokenizer

    from prunekit.demo import MODEL
    from prunekit.testing import tiny

    def save(dtype: torch.dtype = torch.float32, **overrides: int) -> Path:
        path = tmp_path_factory.mktemp("tiny") / "model"
        tiny("llama", vocab_size=2048, **overrides).to(dtype).save_pretrained(path)  # type: ignore[arg-type]
        AutoTokenizer.from_pretrained(MODEL).save_pretrained(path)
        return path

    return save


@pytest.fixture(scope="session")
def saved_letters(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A random Llama of two blocks with one token per letter, in a folder of its own."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    def save(**overrides: float) -> Path:
        path = tmp_path_factory.mktemp("letters") / "tiny"
        torch.manual_seed(0)
        vocabulary = {letter: i for i, letter in enumerate(" abcdefghijklmnopqrstuvwxyz.")}
        letters = Tokenizer(models.WordLevel(vocabulary, unk_token="."))
        letters.pre_tokenizer = pre_tokenizers.Split("", "isolated")
        PreTrainedTokenizerFast(tokenizer_object=letters).save_pretrained(path)
        sizes = {"vocab_size": 28, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
        LlamaForCausalLM(LlamaConfig(**sizes, **heads, **overrides)).save_pretrained(path)  # type: ignore[arg-type]
        return path

    return save


class Killed(BaseException):
    """Like SIGKILL, as far as one process can tell."""


@pytest.fixture
def killed_at(monkeypatch: pytest.MonkeyPatch) -> Callable[..., AbstractContextManager[None]]:
    """`with killed_at(place, name, 3):` what runs inside dies in its third call of `place.name`, or right after it."""

    @contextmanager
    def killed(place: Any, name: str, last: int, *, after: bool = False) -> Iterator[None]:
        method, calls = getattr(place, name), count(1)

        def dying(*args: Any, **kwargs: Any) -> Any:
            if (call := next(calls)) == last and not after:
                raise Killed
            answer = method(*args, **kwargs)
            if call == last:
                raise Killed
            return answer

        with monkeypatch.context() as patch:
            patch.setattr(place, name, dying)
            with pytest.raises(Killed):
                yield

    return killed
