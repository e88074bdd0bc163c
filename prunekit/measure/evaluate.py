"""Perplexity with its label, size, and speed of a model.

There is no "the perplexity": a value without data, split, window length and count compares with nothing.
"""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

import torch

from prunekit.data.draws import draw_evaluation
from prunekit.data.spec import DataSpec
from prunekit.errors import WrongInput
from prunekit.measure.perplexity import perplexity
from prunekit.measure.rounds import FEWEST, Ratio
from prunekit.measure.samples import PROMPTS, samples
from prunekit.measure.speed import Speed, size, speeds, zeros
from prunekit.models.opening import DTYPES, load_tokenizer, resolved_device
from prunekit.models.opening import loaded as loaded_from
from prunekit.system.progress import Progress

FEW_WINDOWS = 20  # below this the standard error itself is a guess
FEW_ROUNDS = 3  # of a model alone, however long they take


def evaluate(
    model: str,
    data: DataSpec,
    *,
    device: str = "auto",
    dtype: str = "auto",
    trust_remote_code: bool = False,
    against: str | None = None,
    prompts: int = 0,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measure perplexity, size and speed of a model.

    Args:
        model: a folder or a hub id.
        data: the text, its window length and its number of tokens, of which the evaluation part is read.
        device: auto, cpu, cuda or cuda:N.
        dtype: of the computation; auto: float32 on a CPU, else that of the checkpoint.
        trust_remote_code: whether code that comes with the model may run.
        against: a second model, timed in turns with the first.
        prompts: how many of `PROMPTS` it continues.
        progress: what the user is told; None: nothing.

    Returns:
        The measurements by name, as JSON values; speeds in tokens per second, the loss in nats per token.

    Raises:
        WrongInput: no such model or data, or too little text.
    """
    progress = progress or Progress()
    loaded = load(model, device=device, dtype=dtype, trust_remote_code=trust_remote_code)
    tokenizer = load_tokenizer(model, trust_remote_code)
    batch = draw_evaluation(
        tokenizer,
        data,
        progress,
        max_seqlen=getattr(loaded.config, "max_position_embeddings", None),
        vocab_size=loaded.get_input_embeddings().weight.shape[0],
    )
    found = perplexity(loaded, batch, progress=progress)
    if found.windows < FEW_WINDOWS:
        progress.say(f"warning: only {found.windows} windows; the perplexity of so few says little, give more --tokens")
    if not math.isfinite(found.value):
        progress.say(
            "warning: the loss is not finite; the model is broken, or its numbers are too large for this dtype"
        )
    weights, models = size(loaded, model), {"model": loaded}
    if against is not None:  # first, as the one that decides what is timed
        other = load(against, device=device, dtype=dtype, trust_remote_code=trust_remote_code)
        models = {"against": other, **models}
    pace = speeds(models, progress, fewest=FEW_ROUNDS if against is None else FEWEST)
    written = samples(loaded, tokenizer, PROMPTS[:prompts])
    return {
        "model": model,
        **found.as_dict(),
        "tokens": batch.n_tokens,
        "digest": batch.digest,
        "parameters": weights.parameters,
        "bytes": weights.bytes,
        "zeros": zeros(loaded),
        **pace["model"].as_dict(),
        "timed": str(pace["model"]),
        "device": pace["model"].device,
        "dtype": str(next(loaded.parameters()).dtype).removeprefix("torch."),
        **({"samples": [asdict(sample) for sample in written]} if written else {}),
        **({} if against is None else {"against": {"model": against, **_ratios(pace["model"], pace["against"])}}),
    }


def _ratios(pace: Speed, other: Speed) -> dict[str, Any]:
    """The other's speed, and how many times as fast the first is, round by round."""
    found = other.as_dict()
    for what, a, b in (("prefill", pace.prefill, other.prefill), ("decode", pace.decode, other.decode)):
        ratio = Ratio.of(a, b)
        found[f"{what}_ratio"], found[f"{what}_ratio_interval"] = ratio.median, [ratio.low, ratio.high]
        found[f"{what}_ratio_clear"] = ratio.clear
    return found


def load(model: str, *, device: str = "auto", dtype: str = "auto", trust_remote_code: bool = False) -> Any:
    """Load a causal language model, dense or pruned, to be measured. On a CPU `auto` computes in float32.

    Raises:
        WrongInput: it cannot be opened, or is not whole.
    """
    place = resolved_device(device)
    if dtype not in ("auto", *DTYPES):
        raise WrongInput(f"no dtype {dtype!r}; there are auto, {', '.join(DTYPES)}")
    exact = place.type != "cuda" and dtype == "auto"
    wanted = torch.float32 if exact else DTYPES.get(dtype, "auto")
    return loaded_from(model, dtype=wanted, trust_remote_code=trust_remote_code).to(place)  # type: ignore[arg-type]
