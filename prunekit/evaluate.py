"""What a model is worth: perplexity with its label, size, and speed.

There is no "the perplexity": a value without data, split, window length and count compares with nothing.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from prunekit.calibration.draws import draw_evaluation
from prunekit.calibration.tokens import TokenBatch
from prunekit.checkpoint import DTYPES, load_tokenizer, resolved_device
from prunekit.checkpoint import loaded as loaded_from
from prunekit.errors import WrongInput
from prunekit.memory import Room
from prunekit.paging import pager_of
from prunekit.progress import Progress
from prunekit.recipe import DataSpec

LOGITS_AT_ONCE = 2**26  # values of a forward pass; 256 MB in float32
ROWS_AT_ONCE = 2**24  # of these in one float32 log-softmax
HIDDEN_BYTES = 2**28  # of windows on their way through a paged model, in memory
CACHES = ("past_key_values", "cache_params")  # of attention, of state spaces
FEW_WINDOWS = 20  # below this the standard error itself is a guess


@dataclass(frozen=True)
class Perplexity:
    """exp of the mean next-token loss over positions 1 … L-1 of every window, each target counted once."""

    value: float
    nll: float  # nats per target
    standard_error: float  # of nll, over windows; nan for one window
    windows: int
    label: str  # ppl/wikitext2-test/seq256/n256/float32
    losses: tuple[float, ...]  # nll of each window, to be paired with another model's

    def above(self, dense: Perplexity) -> tuple[float, float]:
        """Rise of nll over another model's on the same windows, and its paired standard error."""
        if (self.windows, self.label.rsplit("/", 1)[0]) != (dense.windows, dense.label.rsplit("/", 1)[0]):
            raise ValueError(f"{self.label} and {dense.label} are not the same measurement")
        return _mean_and_error([a - b for a, b in zip(self.losses, dense.losses, strict=True)])

    def as_dict(self) -> dict[str, Any]:
        """For reports; without the losses of single windows."""
        return {
            "perplexity": self.value,
            "nll": self.nll,
            "standard_error": self.standard_error,
            "windows": self.windows,
            "label": self.label,
        }


@dataclass(frozen=True)
class Speed:
    """Tokens per second for one sequence, the median of some repeats."""

    prefill: float
    decode: float
    prompt: int  # tokens read in one pass
    new: int  # tokens made one by one
    device: str


@dataclass(frozen=True)
class Size:
    """Parameters, tied ones once, and bytes of the weights on disk (in memory, when there is no folder)."""

    parameters: int
    bytes: int


@torch.no_grad()
def perplexity(
    model: nn.Module, batch: TokenBatch, *, batch_size: int | None = None, progress: Progress | None = None
) -> Perplexity:
    """Perplexity of a causal language model; inf where its loss is not finite.

    Args:
        batch_size: windows per forward pass; None: as many as keep the logits small.
    """
    if batch.seqlen < 2 or len(batch) == 0:
        raise ValueError(f"perplexity needs windows of at least 2 tokens, not {tuple(batch.ids.shape)}")
    weight = next(model.parameters())  # of the embedding, which is always in memory
    if batch_size is None:
        vocabulary = getattr(model.config, "vocab_size", 2**15)
        batch_size = max(1, LOGITS_AT_ONCE // (batch.seqlen * vocabulary))
    losses = list[float]()
    with _evaluating(model), (progress or Progress()).stage(f"perplexity on {batch.source}", len(batch)) as stage:
        windows = batch.ids.split(batch_size)
        for some, logits in zip(windows, _logits(model, windows), strict=True):
            ids = some.to(weight.device)
            losses += [_loss(logits[i, :-1], ids[i, 1:]) for i in range(len(ids))]
            stage.advance(len(ids))
    # windows are of equal length, so the mean of their means weighs every target the same
    nll, error = _mean_and_error(losses)
    dtype = str(weight.dtype).removeprefix("torch.")
    label = f"ppl/{batch.source}/seq{batch.seqlen}/n{len(batch)}/{dtype}"
    return Perplexity(_exp(nll), nll, error, len(batch), label, tuple(losses))


@torch.no_grad()
def speed(model: Any, *, prompt: int = 256, new: int = 32, repeats: int = 3) -> Speed:
    """Time one pass over a prompt, and greedy decoding with a cache after it."""
    device = next(model.parameters()).device
    longest = int(getattr(model.config, "max_position_embeddings", prompt + new))
    new = max(1, min(new, longest // 4))
    prompt = max(1, min(prompt, longest - new))
    ids = (
        torch.arange(prompt, device=device)[None] % model.config.vocab_size
    )  # the text does not matter, its length does
    caches = list[dict[str, Any]]()

    def run(token: Tensor, cache: dict[str, Any]) -> Tensor:
        output = model(input_ids=token, use_cache=True, **cache)
        caches.append({name: output[name] for name in CACHES if name in output})
        return output.logits[:, -1:].argmax(-1)

    def read() -> None:
        run(ids, {})

    def write() -> None:
        token = ids[:, -1:]
        for _ in range(new):
            token = run(token, caches.pop())
        caches.pop()

    with _evaluating(model):
        _ = read(), write()  # the first time pays for what later ones find ready
        times = [(_seconds(read, device), _seconds(write, device)) for _ in range(repeats)]
    first, rest = (statistics.median(column) for column in zip(*times, strict=True))
    return Speed(prompt / first, new / rest, prompt, new, str(device))


def size(model: nn.Module, directory: str | Path | None = None) -> Size:
    """Exact counts; `directory` is where the model was saved."""
    parameters = list(model.parameters())
    files = list(Path(directory).expanduser().glob("*.safetensors")) if directory is not None else []
    stored = sum(file.stat().st_size for file in files) or sum(p.numel() * p.element_size() for p in parameters)
    return Size(sum(p.numel() for p in parameters), stored)


@torch.no_grad()
def zeros(model: Any) -> float:
    """Share of zeros among the weights of linear maps, the one that makes logits apart."""
    head = model.get_output_embeddings()
    weights = [m.weight for m in model.modules() if isinstance(m, nn.Linear) and m is not head]
    total = sum(weight.numel() for weight in weights)
    return 1 - sum(int(weight.count_nonzero()) for weight in weights) / total if total else 0.0


def evaluate(
    model: str,
    dataset: str = "python-docs",
    *,
    split: str | None = None,
    field: str = "text",
    seqlen: int | None = None,
    tokens: int | None = None,
    device: str = "auto",
    dtype: str = "auto",
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measure a model in a folder or on the hub.

    Raises:
        WrongInput: no such model or data, or too little text.
    """
    progress = progress or Progress()
    data = DataSpec(
        dataset=dataset, split=split, evaluation_split=split, field=field, seqlen=seqlen, evaluation_tokens=tokens
    )
    loaded = load(model, device=device, dtype=dtype, trust_remote_code=trust_remote_code)
    batch = draw_evaluation(
        load_tokenizer(model, trust_remote_code),
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
    weights, pace = size(loaded, model), speed(loaded)
    return {
        "model": model,
        **found.as_dict(),
        "tokens": batch.n_tokens,
        "digest": batch.digest,
        "parameters": weights.parameters,
        "bytes": weights.bytes,
        "zeros": zeros(loaded),
        "prefill_tokens_per_second": pace.prefill,
        "decode_tokens_per_second": pace.decode,
        "device": pace.device,
        "dtype": str(next(loaded.parameters()).dtype).removeprefix("torch."),
    }


def load(model: str, *, device: str = "auto", dtype: str = "auto", trust_remote_code: bool = False) -> Any:
    """A causal language model, dense or pruned, to be measured. On a CPU `auto` computes in float32.

    Raises:
        WrongInput: it cannot be opened, or is not whole.
    """
    place = resolved_device(device)
    if dtype not in ("auto", *DTYPES):
        raise WrongInput(f"no dtype {dtype!r}; there are auto, {', '.join(DTYPES)}")
    exact = place.type != "cuda" and dtype == "auto"
    wanted = torch.float32 if exact else DTYPES.get(dtype, "auto")
    return loaded_from(model, dtype=wanted, trust_remote_code=trust_remote_code).to(place)  # type: ignore[arg-type]


def _logits(model: Any, windows: Sequence[Tensor]) -> Iterator[Tensor]:
    """Logits of some windows at a time. Through a paged model all go block by block: each is read once."""
    if pager_of(model) is None:
        device = next(model.parameters()).device
        yield from (model(input_ids=some.to(device), use_cache=False).logits for some in windows)
        return
    from prunekit.adapters import adapter_for  # evaluating models that nobody will prune needs no adapter
    from prunekit.calibration.flow import entered

    adapter = adapter_for(model.config.model_type)
    room, calls = Room(HIDDEN_BYTES), []
    hidden = room.row()
    for some in windows:
        state, made = entered(model, adapter, some)
        hidden.append(state)
        calls.append(made)
    for index, block in enumerate(adapter.blocks(model)):
        for i, made in enumerate(calls):
            hidden[i] = made[index](block, hidden[i])
    yield from (adapter.logits(model, state) for state in hidden)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Dropout off inside, as it was after."""
    was = model.training
    model.eval()
    yield
    model.train(was)


def _loss(logits: Float[Tensor, "targets vocabulary"], ids: Int64[Tensor, " targets"]) -> float:
    """Mean loss of one window in float32, a few rows at a time."""
    rows = max(1, ROWS_AT_ONCE // logits.shape[1])
    parts = zip(logits.split(rows), ids.split(rows), strict=True)
    total = sum(float(cross_entropy(some.float(), wanted, reduction="sum")) for some, wanted in parts)
    return total / len(ids)


def _mean_and_error(values: list[float]) -> tuple[float, float]:
    if not all(map(math.isfinite, values)):
        return math.inf, math.nan
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return math.fsum(values) / len(values), error


def _exp(nll: float) -> float:
    return math.exp(nll) if nll < 700 else math.inf


def _seconds(work: Callable[[], None], device: torch.device) -> float:
    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    wait()
    begun = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - begun
