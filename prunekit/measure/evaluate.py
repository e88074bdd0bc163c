"""Perplexity with its label, tasks, size, and speed of a model.

There is no "the perplexity": a value without data, split, window length and count compares with nothing.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from transformers import PreTrainedModel

from prunekit.data.draws import draw_evaluation
from prunekit.data.harness import HarnessSpec, open_tasks
from prunekit.data.spec import DataSpec
from prunekit.data.tokens import TokenBatch
from prunekit.errors import WrongInput, one_line
from prunekit.measure.harness import ask, batch_of, check_tokenizer, results
from prunekit.measure.perplexity import Perplexity, bits_per_byte, perplexity
from prunekit.measure.ratios import FEWEST
from prunekit.measure.samples import PROMPTS, samples
from prunekit.measure.speed import Speed, ratios, size, speeds, zeros
from prunekit.models.modules import evaluating, text_config
from prunekit.models.opening import DTYPES, load_tokenizer, resolved_device
from prunekit.models.opening import loaded as loaded_from
from prunekit.plugins.registry import ADAPTERS
from prunekit.system.progress import Progress

FEW_WINDOWS = 20  # below this the standard error itself is a guess
FEW_ROUNDS = 3  # of a model alone, however long they take
LOOK_AHEAD = 16  # tokens by which it is seen whether a model is causal
AHEAD = 1e-3  # share of the spread of logits that a later token may change, by rounding; or in half precision
ROUNDED = 16  # times the precision of a number


def evaluate(
    model: str | PreTrainedModel,
    data: DataSpec,
    *,
    tokenizer: Any = None,
    device: str = "auto",
    dtype: str = "auto",
    trust_remote_code: bool = False,
    against: str | PreTrainedModel | None = None,
    prompts: int = 0,
    harness: HarnessSpec | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measure perplexity, size and speed of a model, and how well it does tasks.

    Args:
        model: a folder or a hub id of any causal language model that transformers loads, or one in memory, which stays
            on its device and in its dtype.
        data: the text, its window length and its number of tokens, of which the evaluation part is read.
        tokenizer: of models in memory.
        device: auto, cpu, cuda or cuda:N.
        dtype: of the computation; auto: float32 on a CPU, else that of the checkpoint.
        trust_remote_code: whether code that comes with the model, or with task files, may run.
        against: a second model, judged on the same text and tasks, and timed in turns with the first.
        prompts: how many of `PROMPTS` it continues.
        harness: tasks of lm-evaluation-harness; None: none.
        progress: what the user is told; None: nothing.

    Returns:
        The measurements by name, as JSON values; speeds in tokens per second, the loss in nats per token.

    Raises:
        WrongInput: no such model, data or task, a model that is not causal, or too little text.
    """
    progress = progress or Progress()
    exam = None
    if harness is not None:  # first, as what is wrong with tasks is known before a model is read
        exam = open_tasks(harness.tasks, harness.folder, trust_remote_code=trust_remote_code, progress=progress)

    def judge(source: str | PreTrainedModel) -> _Judged:
        if not isinstance(source, PreTrainedModel):
            found = load(source, device=device, dtype=dtype, trust_remote_code=trust_remote_code)
            return _Judged.of(source, found, load_tokenizer(source, trust_remote_code), data, progress)
        if tokenizer is None:
            raise WrongInput("a model in memory needs its tokenizer: evaluate(model, tokenizer, ...)")
        return _Judged.of(_name_of(source), source, tokenizer, data, progress)

    first = judge(model)
    second = None if against is None else judge(against)
    both = [each for each in (first, second) if each is not None]
    if harness is not None:
        for each in both:
            check_tokenizer(each.tokenizer, harness, each.name)
    tasks = {}
    if harness is not None and exam is not None:
        batch = harness.batch_size or batch_of(first.model)
        spec = replace(harness, batch_size=batch)
        papers = [
            ask(exam, one.model, one.tokenizer, spec, name=one.name, trust_remote_code=trust_remote_code,
                progress=progress)
            for one in both
        ]  # fmt: skip
        how = {"chat_template": spec.chat_template, "limit": spec.limit, "batch_size": batch}
        tasks = {"harness": how | results(exam, *papers)}
    weights = size(first.model, model if isinstance(model, str) else None)
    # the other first, as the one that decides what is timed
    models = {"model": first.model} if second is None else {"against": second.model, "model": first.model}
    pace = _paced(models, progress)
    written = samples(first.model, first.tokenizer, PROMPTS[:prompts])
    return {
        "model": first.name,
        **first.as_dict(),
        "tokens": first.batch.n_tokens,
        "digest": first.batch.digest,
        "parameters": weights.parameters,
        "bytes": weights.bytes,
        "zeros": zeros(first.model),
        **({} if pace is None else {**pace["model"].as_dict(), "timed": str(pace["model"])}),
        "device": str(next(first.model.parameters()).device),
        "dtype": str(next(first.model.parameters()).dtype).removeprefix("torch."),
        **tasks,
        **({"samples": [asdict(sample) for sample in written]} if written else {}),
        **({} if second is None else {"against": _beside(first, second) | _ratios(pace)}),
    }


@dataclass(frozen=True)
class _Judged:
    """A model, and what it makes of a text."""

    name: str
    model: Any
    tokenizer: Any
    batch: TokenBatch
    loss: Perplexity
    bits: float  # per byte

    @classmethod
    def of(cls, name: str, model: Any, tokenizer: Any, data: DataSpec, progress: Progress) -> _Judged:
        batch = draw_evaluation(
            tokenizer,
            data,
            progress,
            max_seqlen=getattr(text_config(model.config), "max_position_embeddings", None),
            vocab_size=model.get_input_embeddings().weight.shape[0],
        )
        check_causal(model, batch, name)
        found = perplexity(model, batch, progress=progress)
        if found.windows < FEW_WINDOWS:
            progress.say(
                f"warning: only {found.windows} windows; the perplexity of so few says little, give more --tokens"
            )
        if not math.isfinite(found.value):
            progress.say(
                "warning: the loss is not finite; the model is broken, or its numbers are too large for this dtype"
            )
        return cls(name, model, tokenizer, batch, found, bits_per_byte(found, batch, tokenizer))

    def as_dict(self) -> dict[str, Any]:
        return self.loss.as_dict() | {"bits_per_byte": self.bits}


@torch.no_grad()
def check_causal(model: Any, batch: TokenBatch, name: str) -> None:
    """Refuse a model that reads what it is to predict, as encoders do: its loss is no likelihood of the text.

    Raises:
        WrongInput: another last token changes what it says before.
    """
    ids = batch.ids[:1, :LOOK_AHEAD].to(next(model.parameters()).device)
    other = ids.clone()
    other[0, -1] = 0 if ids[0, -1] else 1
    with evaluating(model):
        logits, changed = (model(input_ids=given, use_cache=False).logits[:, :-1].float() for given in (ids, other))
    apart = float((logits - changed).abs().max()) / float(logits.std().clamp(min=1e-30))
    if apart > max(AHEAD, ROUNDED * torch.finfo(next(model.parameters()).dtype).eps):
        raise WrongInput(
            f"{name!r} is not causal: a later token changes what it predicts before, so its loss is no likelihood; "
            "give a causal language model"
        )


def _name_of(model: PreTrainedModel) -> str:
    return str(getattr(model.config, "_name_or_path", "") or type(model).__name__)


def _beside(first: _Judged, second: _Judged) -> dict[str, Any]:
    """The second model on the text, and where the tokens are the same the rise of the first one's loss, by window."""
    found = {"model": second.name, **second.as_dict()}
    if first.batch.digest == second.batch.digest:
        found["nll_rise"], found["nll_rise_standard_error"] = first.loss.above(second.loss)
    return found


def _paced(models: dict[str, Any], progress: Progress) -> dict[str, Speed] | None:
    """The speed of one model, or of two in turns. None: a family that nobody here knows cannot be timed."""
    try:
        return speeds(models, progress, fewest=FEW_ROUNDS if len(models) == 1 else FEWEST)
    except Exception as error:  # of a class of anybody's
        if all(model.config.model_type.removeprefix("prunekit_") in ADAPTERS for model in models.values()):
            raise
        progress.say(f"note: speed is not measured: {one_line(error)}")
        return None


def _ratios(paces: dict[str, Speed] | None) -> dict[str, Any]:
    """The other's speed, and how many times as fast the first is, round by round."""
    if paces is None:
        return {}
    return paces["against"].as_dict() | ratios(paces["model"], paces["against"])


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
