"""vLLM: it runs a folder, in a process of its own, which may be of another Python than this one.

The fresh process runs this file alone, which then imports nothing of prunekit; vLLM itself finds prunekit's classes by
their entry point, where prunekit is installed beside it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

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


def answer(
    asked: Mapping[str, Tensor], path: str, new_tokens: str
) -> tuple[dict[str, Any], dict[str, Tensor]]:  # called by a fresh process
    """What vLLM says of windows, and how it continues a prompt: in float32, whatever dtype the files have."""
    import torch

    windows, prompt, new = asked["ids"].tolist(), asked["prompt"].tolist(), int(new_tokens)
    length = max(len(windows[0]) + 1, len(prompt) + new)
    model = opened(path, length, dtype="float32", enforce_eager=True)
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
    from vllm import LLM

    return LLM(
        model=path, max_model_len=length, skip_tokenizer_init=True, generation_config="vllm", trust_remote_code=False,
        enable_prefix_caching=False, seed=0, max_num_seqs=4, disable_log_stats=True, **settings,
    )  # fmt: skip


def _read(model: Any, windows: Sequence[Sequence[int]]) -> list[list[dict[int, float]]]:
    """Log-probabilities of tokens behind every position of every window."""
    from vllm import SamplingParams

    how = SamplingParams(
        temperature=0, max_tokens=1, ignore_eos=True, detokenize=False, prompt_logprobs=LIKELIEST, logprobs=LIKELIEST
    )
    rows = list[list[dict[int, float]]]()
    for reply in model.generate([{"prompt_token_ids": window} for window in windows], how, use_tqdm=False):
        told = [*reply.prompt_logprobs[1:], reply.outputs[0].logprobs[0]]  # nothing stands before the first token
        rows.append([{token: each.logprob for token, each in behind.items()} for behind in told])
    return rows


def _continue(model: Any, prompt: Sequence[int], new: int) -> list[int]:
    """The likeliest tokens behind a prompt, one after the other."""
    from vllm import SamplingParams

    if not new:
        return []
    how = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True, detokenize=False)
    return list(model.generate([{"prompt_token_ids": list(prompt)}], how, use_tqdm=False)[0].outputs[0].token_ids)


def _count(folder: Path) -> tuple[int, int]:
    """(numbers in the files of a model, tensors in them): vLLM refuses a file with a tensor that it does not use."""
    from safetensors import safe_open

    sizes = list[int]()
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as stored:
            shapes = [stored.get_slice(name).get_shape() for name in stored.keys()]  # noqa: SIM118
        sizes += [_product(shape) for shape in shapes]
    return sum(sizes), len(sizes)


def _product(shape: Sequence[int]) -> int:
    size = 1
    for each in shape:
        size *= each
    return size
