"""Every test: one thread, so that workers do not fight for cores and sums have one order; no network; the same draws.

And what several files need: small models on disk, runs that are killed, and a process that has transformers loaded.
"""

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from itertools import count
from pathlib import Path
from typing import IO, Any

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


class Forks:
    """Runs Python scripts in forks of a process that has transformers loaded; it starts with the first of them."""

    def __init__(self, scratch: Path, stack: ExitStack) -> None:
        self._scratch, self._stack, self._pipes = scratch, stack, list[IO[str]]()

    def run(
        self, command: list[Any], *, env: Mapping[str, str] = os.environ, cwd: Path | str = ".", **how: Any
    ) -> subprocess.CompletedProcess[str]:
        """As `subprocess.run` of [python, "-P", script, ...], with both streams captured as text."""
        if command[0] != sys.executable:  # of another Python there is nothing to fork
            return subprocess.run(command, env=env, cwd=cwd, **how)  # noqa: PLW1510 - it is among `how`
        if not self._pipes:
            server = [sys.executable, "-P", Path(__file__).with_name("forks.py")]
            process = subprocess.Popen(server, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            self._stack.enter_context(process)
            assert process.stdin is not None
            assert process.stdout is not None
            self._pipes = [process.stdin, process.stdout]
        streams = [self._scratch / name for name in ("out", "err")]
        for stream in streams:
            stream.unlink(missing_ok=True)
        asked = {"argv": command[2:], "env": dict(env), "cwd": cwd, "streams": streams}
        print(json.dumps(asked, default=str), file=self._pipes[0], flush=True)
        code = int(self._pipes[1].readline())
        return subprocess.CompletedProcess(command, code, *(stream.read_text() for stream in streams))


@pytest.fixture(scope="session")
def forks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forks]:
    with ExitStack() as stack:
        yield Forks(tmp_path_factory.mktemp("forks"), stack)


@pytest.fixture(scope="session", autouse=True)
def _verified_in_forks(forks: Forks) -> Iterator[None]:
    """What is exported is verified in a fork, unless a test asks for `fresh`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(importlib.import_module("prunekit.export.fresh"), "subprocess", forks)
        yield


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """Exports are verified in a fresh process, as those of users are."""
    monkeypatch.setattr(importlib.import_module("prunekit.export.fresh"), "subprocess", subprocess)


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
