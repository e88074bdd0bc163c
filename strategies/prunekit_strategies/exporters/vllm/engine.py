"""vLLM: it runs a folder, in a process of its own, which may be of another Python than this one.

The fresh process runs this file alone, which then imports nothing of prunekit; vLLM itself finds prunekit's classes by
their entry point, where prunekit is installed beside it.
"""

from __future__ import annotations

import importlib
import json
import math
import os
import re
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

PACKAGE = "vllm"
OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
MARK = "prunekit: "  # in front of what a process answers, among what vLLM prints
NATIVE: dict[str, list[str]] = {  # by model type: what vLLM's kernels get wrong, and its PyTorch code does not
    # vLLM's class passes queries as (tokens, heads, width), and the kernel for CPUs of 0.32.0 counts heads in the last
    # dimension alone: it takes every head for a token, and turns the i-th head of all by the position of the i-th token
    "lfm2": ["rotary_embedding"],
}
IN_BFLOAT16 = ("qwen3_next",)  # model types that vLLM's build for CPUs computes in bfloat16 alone: their delta nets
LIKELIEST = 20  # tokens whose log-probabilities vLLM tells at every position, without being told to tell more
SETTINGS = {  # of the environment, where the user has not set them
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # in this process, which ends with the one that asked
    "VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1",  # a window may be as long as the model takes, and one token is made behind it
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_LOGGING_STREAM": "ext://sys.stderr",
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # others compute on this machine, too
    "VLLM_NO_USAGE_STATS": "1",
}


def cause_of(said: str) -> str:
    """The line that says why, in what a process said before it failed."""
    lines = [re.sub(r"^\[rank\d+\]:", "", line).strip() for line in said.splitlines() if line.strip()]
    errors = [line for line in lines if line.partition(":")[0].endswith(("Error", "Exception", "Exit"))]
    return (errors or lines or ["it ended without a word"])[-1][:600]


class Timer:
    """A folder that is open in a process of its own, to be timed again and again; the process ends with this object."""

    def __init__(self, path: Path, python: str, threads: int = 1) -> None:
        self._settings = OFFLINE | {"OMP_NUM_THREADS": str(threads)}
        self._command, self._length = [python, "-P", __file__, str(path.resolve())], 0
        self._child: subprocess.Popen[str] | None = None

    def __call__(self, batch: int, prompt: int, new: int) -> tuple[int, int]:
        """Time one turn.

        Args:
            batch: prompts.
            prompt: tokens of each.
            new: tokens that are made behind the first one of each.

        Returns:
            Nanoseconds of reading the prompts and making a first token of each, and of making the others.

        Raises:
            RuntimeError: vLLM ended.
        """
        if self._child is None or self._length < prompt + new + 1:
            self.close()
            self._length, pipe = prompt + new + 1, subprocess.PIPE
            command = [*self._command, str(self._length)]
            self._child = subprocess.Popen(command, stdin=pipe, stdout=pipe, env=os.environ | self._settings, text=True)
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        try:
            self._child.stdin.write(json.dumps([batch, prompt, new]) + "\n")
            self._child.stdin.flush()
        except BrokenPipeError:
            pass  # there is no answer either
        told = next((line for line in self._child.stdout if line.startswith(MARK)), None)
        if told is None:
            self.close()
            raise RuntimeError(f"vLLM ended while {self._command[-1]} was timed")
        read, made = json.loads(told.removeprefix(MARK))
        return read, made

    def close(self) -> None:
        """End the process."""
        child, self._child = self._child, None
        if child is not None:
            child.kill()
            with child, suppress(BrokenPipeError):  # closes its pipes, and waits
                pass

    def __del__(self) -> None:
        self.close()


# -- in the fresh process --------------------------------------------------------------------------------


def answer(
    asked: Mapping[str, Tensor], path: str, new_tokens: str
) -> tuple[dict[str, Any], dict[str, Tensor]]:  # called by a fresh process
    """What vLLM says of windows, and how it continues a prompt: in float32, whatever dtype the files have, or where it
    cannot in bfloat16."""
    import torch

    windows, prompt, new = asked["ids"].tolist(), asked["prompt"].tolist(), int(new_tokens)
    length = max(len(windows[0]) + 1, len(prompt) + new)
    model = opened(path, length, dtype=_dtype(path), enforce_eager=True)
    logprobs = torch.full(asked["tokens"].shape, torch.nan)
    likeliest = torch.zeros(asked["ids"].shape, dtype=torch.long)
    for window, row in enumerate(_read(model, windows)):
        for position, told in enumerate(row):
            likeliest[window, position] = max(told, key=lambda token: told[token])
            for place, token in enumerate(asked["tokens"][window, position].tolist()):
                logprobs[window, position, place] = told.get(token, torch.nan)
    found = {
        "logprobs": logprobs,
        "likeliest": likeliest,
        "continuation": torch.tensor(_continue(model, prompt, new), dtype=torch.long),
    }
    parameters, tensors = _count(Path(path))
    return {"parameters": parameters, "tensors": tensors}, found


def opened(path: str, length: int, **settings: Any) -> Any:
    """A model in vLLM, that reads and makes so many tokens at most."""
    os.environ.update({name: value for name, value in SETTINGS.items() if name not in os.environ})
    if native := NATIVE.get(model_type_of(Path(path))):
        settings["compilation_config"] = {"custom_ops": [f"-{name}" for name in native]}
    return importlib.import_module(PACKAGE).LLM(
        model=path, max_model_len=length, skip_tokenizer_init=True, generation_config="vllm", trust_remote_code=False,
        enable_prefix_caching=False, seed=0, max_num_seqs=4, disable_log_stats=True, **settings,
    )  # fmt: skip


def _dtype(path: str) -> str:
    """What a model is asked in: the dtype that rounds least, of those that vLLM computes it in here."""
    if model_type_of(Path(path)) not in IN_BFLOAT16:
        return "float32"
    on_cpu = importlib.import_module(f"{PACKAGE}.platforms").current_platform.is_cpu()
    return "bfloat16" if on_cpu else "float32"


def model_type_of(folder: Path) -> str:
    """What a folder says it is; "" where it says nothing, which vLLM then tells."""
    file = folder / "config.json"
    return str(json.loads(file.read_text(encoding="utf-8")).get("model_type", "")) if file.exists() else ""


def _read(model: Any, windows: Sequence[Sequence[int]]) -> list[list[dict[int, float]]]:
    """Log-probabilities of tokens behind every position of every window."""
    how = _asking(max_tokens=1, prompt_logprobs=LIKELIEST, logprobs=LIKELIEST)
    rows = list[list[dict[int, float]]]()
    for reply in model.generate([{"prompt_token_ids": window} for window in windows], how, use_tqdm=False):
        told = [*reply.prompt_logprobs[1:], reply.outputs[0].logprobs[0]]  # nothing stands before the first token
        rows.append([{token: each.logprob for token, each in behind.items()} for behind in told])
    return rows


def _continue(model: Any, prompt: Sequence[int], new: int) -> list[int]:
    """The likeliest tokens behind a prompt, one after the other."""
    if not new:
        return []
    how = _asking(max_tokens=new)
    return list(model.generate([{"prompt_token_ids": list(prompt)}], how, use_tqdm=False)[0].outputs[0].token_ids)


def _asking(**how: Any) -> Any:
    """What is asked for behind a prompt: always the likeliest tokens, as ids, and no end before their number."""
    return importlib.import_module(PACKAGE).SamplingParams(temperature=0, ignore_eos=True, detokenize=False, **how)


def _count(folder: Path) -> tuple[int, int]:
    """(numbers in the files of a model, tensors in them): vLLM refuses a file with a tensor that it does not use."""
    from safetensors import safe_open

    sizes = list[int]()
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as stored:
            shapes = [stored.get_slice(name).get_shape() for name in stored.keys()]  # noqa: SIM118
        sizes += [math.prod(shape) for shape in shapes]
    return sum(sizes), len(sizes)


def _pace(model: Any, batch: int, prompt: int, new: int) -> tuple[int, int]:
    """Nanoseconds of reading prompts and making a first token of each, and of making so many more."""
    vocabulary, spent = model.llm_engine.model_config.get_vocab_size(), [0, 0]
    texts = [
        {"prompt_token_ids": [(7 * place + text) % vocabulary for place in range(prompt)]} for text in range(batch)
    ]
    for turn, tokens in enumerate((1, new + 1)):
        how = _asking(max_tokens=tokens)
        begun = time.perf_counter_ns()
        model.generate(texts, how, use_tqdm=False)
        spent[turn] = time.perf_counter_ns() - begun
    return spent[0], max(1, spent[1] - spent[0])


def _serve(path: str, length: str) -> None:
    """Time what is asked for, line by line, until nobody asks."""
    model: Any = None
    for line in sys.stdin:
        batch, prompt, new = json.loads(line)
        if model is None:
            model = opened(path, int(length), dtype="auto")
            _pace(model, batch, prompt, new)  # the first run does not count
        print(f"{MARK}{json.dumps(_pace(model, batch, prompt, new))}", flush=True)


if __name__ == "__main__":
    _serve(*sys.argv[1:])
