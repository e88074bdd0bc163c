"""llama.cpp, through the package llama-cpp-python: it runs a file, in a process of its own that may die of one.

The fresh process runs this file alone, which then imports nothing of prunekit.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import logging
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    from jaxtyping import Float, Int64
    from torch import Tensor

PACKAGE = "llama_cpp"
INSTALL = 'pip install "prunekit[llama-cpp]"'
F32 = 0  # of ggml: keys and values are cached as they are computed
CHAT = 1024  # tokens that a chat may have
PART = 512  # tokens of a prompt that are computed together
CRASHES = ("SIGSEGV", "SIGILL", "SIGBUS")  # what ends it where its layout for a processor is broken; some, of a system

_log = logging.getLogger(__name__)
_runs = dict[Path, bool]()  # files that it has run -> whether only as they are stored


class EngineFailed(RuntimeError):
    """The engine cannot do something with a file; says what it said."""


@dataclass(frozen=True)
class Speeds:
    """Tokens per second, medians over rounds."""

    prefill: float
    decode: float
    prompt: int  # tokens that are read at once
    new: int  # tokens that are made one by one
    rounds: int


def installed() -> bool:
    """Whether the engine is there."""
    return importlib.util.find_spec(PACKAGE) is not None


def compute_logits(
    path: Path, ids: Int64[Tensor, "windows length"], threads: int = 1
) -> Float[Tensor, "windows length vocabulary"]:
    """The logits that the engine computes for tokens, with keys and values cached in float32.

    Raises:
        EngineFailed: it cannot load or run the file.
    """
    return _ask(path, "logits", {"ids": ids}, threads=threads)[1]["logits"]


def generate(path: Path, prompt: Sequence[int], new: int, threads: int = 1) -> list[int]:
    """The `new` likeliest tokens behind a prompt, one after the other."""
    return _ask(path, "generate", ids=list(prompt), new=new, threads=threads)[0]["tokens"]


def tokenize(path: Path, texts: Sequence[str], *, special: bool = False) -> list[list[int]]:
    """The ids of texts; in them special tokens are found. With `special`, as a text begins: with BOS, where it does."""
    return _ask(path, "tokenize", texts=list(texts), special=special)[0]["tokens"]


def chat(path: Path, messages: Sequence[Mapping[str, str]], new: int = 64, threads: int = 1) -> str:
    """The likeliest answer to messages (role and content each), by the chat template in the file."""
    return _ask(path, "chat", messages=[dict(each) for each in messages], new=new, threads=threads)[0]["text"]


def measure(path: Path, prompt: int = 512, new: int = 64, rounds: int = 5, threads: int = 1) -> Speeds:
    """How fast the engine reads `prompt` tokens at once and makes `new` ones, one by one."""
    found = _ask(path, "measure", prompt=prompt, new=new, rounds=rounds, threads=threads)[0]
    return Speeds(median(found["prefill"]), median(found["decode"]), prompt, new, rounds)


def quantize(source: Path, target: Path, dtype: str, threads: int = 1) -> None:
    """Let the engine write a file in a quantized type of its own.

    Args:
        source: a file in float16 or larger.
        target: where; what is there is overwritten.
        dtype: as in names of files, such as q4_k_m.
        threads: that work on it.

    Raises:
        EngineFailed: says what it said.
    """
    _ask(source, "quantize", target=str(target.resolve()), dtype=dtype, threads=threads)


def open_timer(path: Path, threads: int = 1) -> Callable[[int, int, int], tuple[int, int]]:
    """Open a file in this process, to time it again and again.

    Returns:
        A function of (batch, prompt tokens, new tokens) that gives the nanoseconds of reading the prompts, and of
        making the new tokens, one prompt after the other.
    """
    models: dict[int, Any] = {}
    if path.resolve() not in _runs:  # of what ends it, this process would die too
        _ask(path, "generate", ids=[1] * PART, new=1, threads=threads)
    stored = _runs[path.resolve()]

    def run(batch: int, prompt: int, new: int) -> tuple[int, int]:
        if prompt + new not in models:
            models.clear()
            models[prompt + new] = _opened(str(path), prompt + new, threads, stored=stored)
            _pace(models[prompt + new], prompt, 1)  # the first run does not count
        paces = [_pace(models[prompt + new], prompt, new) for _ in range(batch)]
        return sum(read for read, _ in paces), sum(made for _, made in paces)

    return run


def _ask(path: Path, do: str, asked: Mapping[str, Tensor] | None = None, **request: Any) -> tuple[Any, Any]:
    """Ask in a fresh process; again, with weights as they are stored, if their layout for this processor ends it."""
    from prunekit.export.fresh import Failed, ask_fresh

    file = path.resolve()
    for stored in (False, True) if file not in _runs else (_runs[file],):
        try:
            found = ask_fresh(__file__, asked or {}, [file, do, json.dumps(request | {"stored": stored})])
        except Failed as error:
            if -error.code in [getattr(signal, name, None) for name in CRASHES] and not stored:
                continue
            said = " ".join(str(error).split())[-600:] or f"it ended with code {error.code}, without a word"
            raise EngineFailed(f"llama.cpp cannot run {path}: {said}") from error
        if do not in ("quantize", "tokenize"):  # which read no weights, or do not compute with them
            if stored and file not in _runs:
                _log.warning(
                    "llama.cpp crashes with the weights of %s laid out for this processor; it runs them as they are "
                    "stored, which other programs that use it may have to be told (use_extra_bufts = false)", path.name
                )  # fmt: skip
            _runs[file] = stored
        return found
    raise AssertionError  # the second try returns or raises


# -- in the fresh process --------------------------------------------------------------------------------


def answer(tensors: Mapping[str, Tensor], path: str, do: str, asked: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What was asked."""
    llama_cpp: Any = importlib.import_module(PACKAGE)
    request = json.loads(asked)
    threads, stored = request.get("threads", 1), request["stored"]
    if do == "quantize":
        _quantize(llama_cpp, path, request)
        return {}, {}
    if do == "tokenize":
        model = llama_cpp.Llama(path, vocab_only=True, verbose=False)
        whole = request["special"]
        return {"tokens": [model.tokenize(t.encode(), add_bos=whole, special=True) for t in request["texts"]]}, {}
    if do == "logits":
        windows, ids = list[np.ndarray](), tensors["ids"].tolist()
        model = _opened(path, len(ids[0]), threads, exact=True, logits_all=True, stored=stored)
        for window in ids:
            model.reset()
            model.eval(window)
            windows.append(np.array(model.scores[: len(window)], dtype=np.float32))
        return {}, {"logits": torch.from_numpy(np.stack(windows))}
    if do == "generate":
        model = _opened(path, len(request["ids"]) + request["new"], threads, exact=True, stored=stored)
        return {"tokens": [*_likeliest(model, request["ids"], request["new"])]}, {}
    if do == "chat":
        model = _opened(path, CHAT, threads, exact=True, stored=stored)
        found: Any = model.create_chat_completion(request["messages"], temperature=0, max_tokens=request["new"])
        return {"text": found["choices"][0]["message"]["content"]}, {}
    prompt, new, rounds = request["prompt"], request["new"], request["rounds"]
    model = _opened(path, prompt + new, threads, stored=stored)
    _pace(model, prompt, 1)  # the first run does not count
    paces = [_pace(model, prompt, new) for _ in range(rounds)]
    return {
        "prefill": [prompt * 1e9 / read for read, _ in paces],
        "decode": [new * 1e9 / made for _, made in paces],
    }, {}


def _opened(
    path: str, length: int, threads: int, *, exact: bool = False, logits_all: bool = False, stored: bool = False
) -> Any:
    llama_cpp: Any = importlib.import_module(PACKAGE)
    cached = {"type_k": F32, "type_v": F32} if exact else {}
    with _as_stored(llama_cpp.llama_cpp) if stored else nullcontext():
        return llama_cpp.Llama(
            path, n_ctx=length, n_batch=length, n_ubatch=min(length, PART), n_threads=threads, n_threads_batch=threads,
            logits_all=logits_all, verbose=False, **cached,
        )  # fmt: skip


@contextmanager
def _as_stored(bindings: Any) -> Iterator[None]:
    """Within: weights are not laid out for a processor's units when a file is opened, for which the package has no
    option."""
    defaults = bindings.llama_model_default_params

    def plain() -> Any:
        settings = defaults()
        settings.use_extra_bufts = False
        return settings

    bindings.llama_model_default_params = plain
    try:
        yield
    finally:
        bindings.llama_model_default_params = defaults


def _likeliest(model: Any, prompt: Sequence[int], new: int) -> Iterator[int]:
    following, logits = list(prompt), importlib.import_module(PACKAGE).llama_get_logits_ith
    for _ in range(new):
        model.eval(following)
        scores = np.ctypeslib.as_array(logits(model.ctx, -1), shape=(model.n_vocab(),))
        following = [int(scores.argmax())]
        yield following[0]


def _pace(model: Any, prompt: int, new: int) -> tuple[int, int]:
    """Nanoseconds of reading so many tokens at once, and of making so many one by one."""
    ids = [index * 7 % model.n_vocab() for index in range(1, prompt + 1)]
    model.reset()
    begun = time.perf_counter_ns()
    model.eval(ids)
    read = time.perf_counter_ns()
    for step in range(new):
        model.eval([ids[step % prompt]])
    return read - begun, time.perf_counter_ns() - read


def _quantize(llama_cpp: Any, path: str, request: Mapping[str, Any]) -> None:
    kinds = {name.removeprefix("LLAMA_FTYPE_MOSTLY_").lower(): name for name in dir(llama_cpp) if "_MOSTLY_" in name}
    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype = getattr(llama_cpp, kinds[request["dtype"]])
    settings.nthread = request["threads"]
    if llama_cpp.llama_model_quantize(path.encode(), request["target"].encode(), settings):
        raise SystemExit(f"it does not quantize it as {request['dtype']}")
