"""llama.cpp, through the package llama-cpp-python: it runs a file, in a process of its own that may die of one.

The child runs this file alone, reads a request as JSON, and leaves arrays and JSON in a scratch folder.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from jaxtyping import Float, Int64

PACKAGE = "llama_cpp"
INSTALL = "pip install llama-cpp-python"
F32 = 0  # of ggml: keys and values are cached as they are computed
RUBBED = 4096  # letters of what a child has said


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
    path: Path, ids: Int64[np.ndarray, "windows length"], threads: int = 1
) -> Float[np.ndarray, "windows length vocabulary"]:
    """The logits that the engine computes for tokens, with keys and values cached in float32.

    Raises:
        EngineFailed: it cannot load or run the file.
    """
    return _ask(path, threads, do="logits", ids=ids.tolist())["logits"]


def generate(path: Path, prompt: Sequence[int], new: int, threads: int = 1) -> list[int]:
    """The `new` likeliest tokens behind a prompt, one after the other."""
    return _ask(path, threads, do="generate", ids=list(prompt), new=new)["tokens"]


def tokenize(path: Path, texts: Sequence[str], *, special: bool = False) -> list[list[int]]:
    """The ids of texts; in them special tokens are found. With `special`, as a text begins: with BOS, where it does."""
    return _ask(path, 1, do="tokenize", texts=list(texts), special=special)["tokens"]


def chat(path: Path, messages: Sequence[Mapping[str, str]], new: int = 64, threads: int = 1) -> str:
    """The likeliest answer to messages (role and content each), by the chat template in the file."""
    return _ask(path, threads, do="chat", messages=[dict(each) for each in messages], new=new)["text"]


def measure(path: Path, prompt: int = 512, new: int = 64, rounds: int = 5, threads: int = 1) -> Speeds:
    """How fast the engine reads `prompt` tokens at once and makes `new` ones, one by one."""
    found = _ask(path, threads, do="measure", prompt=prompt, new=new, rounds=rounds)
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
    _ask(source, threads, do="quantize", target=str(target), dtype=dtype)


class EngineFailed(RuntimeError):
    """The engine cannot do something with a file; says what it said."""


def _ask(path: Path, threads: int, **request: Any) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="prunekit-engine-") as scratch:
        asked = request | {"path": str(path.resolve()), "threads": threads}
        Path(scratch, "request.json").write_text(json.dumps(asked))
        child = subprocess.run(
            [sys.executable, "-P", __file__, scratch], capture_output=True, text=True, errors="replace", check=False
        )
        answer = Path(scratch, "answer.json")
        if child.returncode or not answer.exists():
            said = " ".join(child.stderr[-RUBBED:].split()) or f"it ended with {child.returncode}"
            raise EngineFailed(f"llama.cpp cannot run {path}: {said[-600:]}")
        found = json.loads(answer.read_text())
        for array in Path(scratch).glob("*.npy"):
            found[array.stem] = np.load(array)
        return found


def _answer(folder: Path, request: Mapping[str, Any]) -> None:
    """What was asked, in this process."""
    llama_cpp: Any = importlib.import_module(PACKAGE)
    path, do, found = request["path"], request["do"], dict[str, Any]()
    if do == "quantize":
        _quantize(llama_cpp, request)
    elif do == "tokenize":
        model = llama_cpp.Llama(path, vocab_only=True, verbose=False)
        whole = request["special"]
        found["tokens"] = [model.tokenize(t.encode(), add_bos=whole, special=True) for t in request["texts"]]
    else:
        length = {"logits": lambda: len(request["ids"][0]), "generate": lambda: len(request["ids"]) + request["new"]}
        size = length.get(do, lambda: request.get("prompt", 1024) + request["new"])()
        model = llama_cpp.Llama(
            path, n_ctx=size, n_batch=size, n_ubatch=size, n_threads=request["threads"],
            n_threads_batch=request["threads"], logits_all=do == "logits", verbose=False,
            **({} if do == "measure" else {"type_k": F32, "type_v": F32}),
        )  # fmt: skip
        if do == "logits":
            found |= _logits(folder, model, request["ids"])
        elif do == "generate":
            found["tokens"] = [*_likeliest(model, request["ids"], request["new"])]
        elif do == "chat":
            answer: Any = model.create_chat_completion(request["messages"], temperature=0, max_tokens=request["new"])
            found["text"] = answer["choices"][0]["message"]["content"]
        else:
            found |= _measure(model, request["prompt"], request["new"], request["rounds"])
    (folder / "answer.json").write_text(json.dumps(found))


def _logits(folder: Path, model: Any, ids: Sequence[Sequence[int]]) -> dict[str, Any]:
    windows = []
    for window in ids:
        model.reset()
        model.eval(window)
        windows.append(np.array(model.scores[: len(window)], dtype=np.float32))
    np.save(folder / "logits.npy", np.stack(windows))
    return {}


def _likeliest(model: Any, prompt: Sequence[int], new: int) -> Iterator[int]:
    following, logits = list(prompt), importlib.import_module(PACKAGE).llama_get_logits_ith
    for _ in range(new):
        model.eval(following)
        scores = np.ctypeslib.as_array(logits(model.ctx, -1), shape=(model.n_vocab(),))
        following = [int(scores.argmax())]
        yield following[0]


def _measure(model: Any, prompt: int, new: int, rounds: int) -> dict[str, list[float]]:
    ids = [2 + index * 7 % (model.n_vocab() - 2) for index in range(prompt)]
    found: dict[str, list[float]] = {"prefill": [], "decode": []}
    for turn in range(rounds + 1):  # the first only warms up
        model.reset()
        begun = time.perf_counter()
        model.eval(ids)
        read = time.perf_counter()
        for step in range(new):
            model.eval([ids[step % prompt]])
        ended = time.perf_counter()
        if turn:
            found["prefill"].append(prompt / (read - begun))
            found["decode"].append(new / (ended - read))
    return found


def _quantize(llama_cpp: Any, request: Mapping[str, Any]) -> None:
    kinds = {name.removeprefix("LLAMA_FTYPE_MOSTLY_").lower(): name for name in dir(llama_cpp) if "_MOSTLY_" in name}
    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype = getattr(llama_cpp, kinds[request["dtype"]])
    settings.nthread = request["threads"]
    failed = llama_cpp.llama_model_quantize(request["path"].encode(), request["target"].encode(), settings)
    if failed:
        raise SystemExit(f"it does not quantize {request['path']} as {request['dtype']}")


if __name__ == "__main__":
    _answer(Path(sys.argv[1]), json.loads(Path(sys.argv[1], "request.json").read_text()))
