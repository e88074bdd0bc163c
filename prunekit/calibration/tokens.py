"""From a data set's name to windows of token ids that calibration, search and evaluation never share.

Text is one stream, tokenised in slices of 100,000 characters without special tokens and cut into windows
of equal length. Stretches of that stream follow each other: calibration, search, evaluation; where a data
set has a held-out split, evaluation comes from there.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import torch
from jaxtyping import Int64
from torch import Tensor

from prunekit.errors import WrongInput, first_line
from prunekit.progress import Progress

if TYPE_CHECKING:
    from prunekit.recipe import DataSpec

SLICE = 100_000  # characters a tokenizer sees at a time
DEFAULTS = {"calibration": 131_072, "search": 131_072, "evaluation": 65_536}  # tokens
LEAST = 2_048  # tokens; with less than this in a part nobody asked for less, so we refuse
LONGEST_WINDOW = 2_048  # tokens, unless asked for
POOL = 16  # shuffled windows are drawn from up to this many times the text that is needed
PATIENCE = 3.0  # seconds to find out whether the hub answers
BETWEEN = "\n\n"  # documents, also the lines of wikitext, become one stream


@dataclass(frozen=True, eq=False)
class TokenBatch:
    """Windows of token ids and where they are from."""

    ids: Int64[Tensor, "windows seqlen"]
    source: str  # a short label: wikitext2-test

    @property
    def n_tokens(self) -> int:
        return self.ids.numel()

    @property
    def seqlen(self) -> int:
        return self.ids.shape[1]

    @cached_property
    def digest(self) -> str:
        """sha256 of the ids as little-endian int64."""
        return hashlib.sha256(self.ids.cpu().contiguous().numpy().astype("<i8", copy=False).tobytes()).hexdigest()

    def first(self, tokens: int | None) -> TokenBatch:
        """The first windows that hold at most `tokens` tokens, at least one; None: all."""
        if tokens is None or tokens >= self.n_tokens:
            return self
        return replace(self, ids=self.ids[: max(1, tokens // self.seqlen)])

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class Draws:
    """The tokens of a run."""

    calibration: TokenBatch
    search: TokenBatch
    evaluation: TokenBatch
    source: str  # resolved data set, split, field
    spec: DataSpec  # with every choice made and the digests filled in: draws the same tokens again
    contrast: TokenBatch | None = None  # as many tokens as for calibration, of the second data set if one is named


@dataclass(frozen=True)
class Source:
    """One stream of text."""

    dataset: str
    config: str | None
    split: str | None
    field: str

    @property
    def label(self) -> str:
        """Short, for the keys of results."""
        name = Path(self.dataset).stem if is_file(self.dataset) else self.dataset.replace("/", "--")
        return "-".join(part for part in (name, self.split) if part)

    def __str__(self) -> str:
        if is_file(self.dataset):
            kind = Path(self.dataset).suffix.lower()
            return f"{self.dataset}, field {self.field!r}" if kind in _ROWS else self.dataset
        if self.dataset == "python-docs":
            return f"python-docs, split {self.split!r}"
        config = f", config {self.config!r}" if self.config else ""
        return f"{self.dataset}{config}, split {self.split!r}, field {self.field!r}"

    def texts(self) -> Iterator[str]:
        """Pieces of the stream, read as they are asked for."""
        if is_file(self.dataset):
            path = Path(self.dataset).expanduser()
            return _ROWS.get(path.suffix.lower(), _plain_text)(path, self.field)
        if self.dataset == "python-docs":
            from prunekit.calibration.python_docs import text

            try:
                return iter([text(self.split)])  # type: ignore[arg-type]
            except RuntimeError as error:  # a Python without its library
                raise WrongInput(str(error)) from error
        return _hub_rows(self)


@dataclass(frozen=True)
class Known:
    """What we know of a data set on the hub."""

    path: str
    config: str | None = None
    split: str = "train"
    held_out: str | None = None
    streamed: bool = True


KNOWN = {
    "wikitext2": Known("Salesforce/wikitext", "wikitext-2-raw-v1", held_out="test", streamed=False),
    "c4": Known("allenai/c4", "en", held_out="validation"),
    "fineweb-edu": Known("HuggingFaceFW/fineweb-edu", "sample-10BT"),
}
NAMES = ("auto", "python-docs", *KNOWN)


def draw(
    tokenizer: Any,
    data: DataSpec,
    progress: Progress | None = None,
    *,
    seed: int = 0,
    max_seqlen: int | None = None,
    vocab_size: int | None = None,
) -> Draws:
    """Disjoint tokens for calibration, search and evaluation.

    Args:
        seed: with `data.shuffle`, which windows.
        max_seqlen: the longest window the model was made for.
        vocab_size: ids the model knows.

    Raises:
        WrongInput: no such data, too little of it, or not the tokens whose digests `data` holds.
    """
    progress = progress or Progress()
    seqlen = _seqlen(data, max_seqlen)
    source, held_out = _sources(data, progress)
    asked = {part: getattr(data, f"{part}_tokens") for part in DEFAULTS}
    here = [part for part in DEFAULTS if part != "evaluation" or held_out == source]
    wanted = sum(_windows(asked[p] or DEFAULTS[p], seqlen) for p in here)
    pool = _read(tokenizer, source, wanted * (POOL if data.shuffle else 1), seqlen, progress)
    counts = _shares({p: asked[p] for p in here}, pool, seqlen, source, progress)
    if not data.shuffle:  # so that a run with these counts, which reads no further, ends at the same place
        pool = pool[: sum(counts.values())]

    # evaluation is the end of the pool, so that which windows it holds does not hang on the seed
    if held_out == source:
        evaluation, pool = pool[-counts["evaluation"] :], pool[: -counts["evaluation"]]
    else:
        n = _windows(asked["evaluation"] or DEFAULTS["evaluation"], seqlen)
        evaluation = _read(tokenizer, held_out, n, seqlen, progress)
        fits = _shares({"evaluation": asked["evaluation"]}, evaluation, seqlen, held_out, progress)
        evaluation = evaluation[: fits["evaluation"]]
    if data.shuffle:
        pool = pool[torch.randperm(len(pool), generator=torch.Generator().manual_seed(seed))]
    calibration, search = pool[: counts["calibration"]], pool[counts["calibration"] :][: counts["search"]]

    batches = {
        "calibration": TokenBatch(calibration, source.label),
        "search": TokenBatch(search, source.label),
        "evaluation": TokenBatch(evaluation, held_out.label),
    }
    if data.contrast_dataset is not None:
        second = _source(_named(data.contrast_dataset, progress), None, None, data.field)
        windows = _read(tokenizer, second, counts["calibration"], seqlen, progress)
        _shares({"contrast": counts["calibration"] * seqlen}, windows, seqlen, second, progress)
        batches["contrast"] = TokenBatch(windows, second.label)
        data = data.model_copy(update={"contrast_dataset": second.dataset})
    for batch in batches.values():
        _check_vocabulary(batch, vocab_size)
    spec = data.model_copy(
        update={
            "dataset": source.dataset,
            "config": source.config,
            "split": source.split,
            "evaluation_dataset": held_out.dataset,
            "evaluation_split": held_out.split,
            "seqlen": seqlen,
            "digests": {part: batch.digest for part, batch in batches.items()},
            **{f"{part}_tokens": batches[part].n_tokens for part in DEFAULTS},
        }
    )
    for part, digest in (data.digests or {}).items():
        if part in batches and digest != batches[part].digest:
            raise WrongInput(
                f"the recipe was made with other {part} tokens than {batches[part].source} and this tokenizer give now "
                f"(sha256 {batches[part].digest[:12]}…, not {digest[:12]}…); "
                "bring back the old text, or remove data.digests from the recipe"
            )
    return Draws(**batches, source=str(source), spec=spec)


def draw_evaluation(
    tokenizer: Any,
    data: DataSpec,
    progress: Progress | None = None,
    *,
    max_seqlen: int | None = None,
    vocab_size: int | None = None,
) -> TokenBatch:
    """The first tokens of the held-out split, or of the whole text where there is none.

    Raises:
        WrongInput: no such data, or too little of it.
    """
    progress = progress or Progress()
    seqlen = _seqlen(data, max_seqlen)
    _, source = _sources(data, progress)
    windows = _windows(data.evaluation_tokens or DEFAULTS["evaluation"], seqlen)
    pool = _read(tokenizer, source, windows, seqlen, progress)
    count = _shares({"evaluation": data.evaluation_tokens}, pool, seqlen, source, progress)["evaluation"]
    batch = TokenBatch(pool[:count], source.label)
    _check_vocabulary(batch, vocab_size)
    return batch


def is_file(dataset: str) -> bool:
    """The name is that of a local file; raises when it can only be one and is not there.

    Raises:
        WrongInput: no such file, or a folder.
    """
    if dataset in NAMES:
        return False
    path = Path(dataset).expanduser()
    if path.is_file():
        return True
    if path.is_dir():
        raise WrongInput(f"data set {dataset!r} is a folder; give a text, .jsonl or .parquet file")
    looks_like_file = path.suffix.lower() in {".txt", ".text", ".md", *_ROWS}
    if looks_like_file or dataset.startswith((".", "/", "~")) or dataset.count("/") > 1:
        raise WrongInput(f"no file {dataset!r}; give a text, .jsonl or .parquet file, or one of {', '.join(NAMES)}")
    if "/" not in dataset:
        near = difflib.get_close_matches(dataset, NAMES, n=1)
        guess = f"did you mean {near[0]!r}? " if near else ""
        raise WrongInput(
            f"no data set {dataset!r}; {guess}there are {', '.join(NAMES)}, local files, and owner/name on the hub"
        )
    return False


# -- which text ---------------------------------------------------------------------------------------


def _sources(data: DataSpec, progress: Progress) -> tuple[Source, Source]:
    """The stream for calibration and search, and the one for evaluation; the same when there is no other."""
    name = _named(data.dataset, progress)
    source = _source(name, data.config, data.split, data.field)
    other = data.evaluation_dataset
    if other is None or _same(other, name):
        return source, _source(name, source.config, data.evaluation_split, data.field, held_out_from=source.split)
    return source, _source(_named(other, progress), None, data.evaluation_split, data.field, held_out_from="train")


def _same(one: str, two: str) -> bool:
    """Two names of one data set."""
    if is_file(one) and is_file(two):
        return Path(one).expanduser().samefile(Path(two).expanduser())
    return len({KNOWN[name].path if name in KNOWN else name for name in (one, two)}) == 1


def _source(name: str, config: str | None, split: str | None, field: str, held_out_from: str | None = None) -> Source:
    """A stream with its split chosen: a held-out one, or else `held_out_from`, when that is given."""
    if is_file(name):
        if split or config:
            raise WrongInput(f"a file has no split or config; {name!r} was asked for {split or config!r}")
        return Source(name, None, None, field)
    if name == "python-docs":
        splits = ("train", "validation", "test")
        if split is not None and split not in splits:
            raise WrongInput(f"no split {split!r} of python-docs; there are {', '.join(splits)}")
        return Source(name, None, split or ("test" if held_out_from else "train"), "text")
    known = KNOWN.get(name)
    if known is not None:
        natural = (known.held_out or held_out_from) if held_out_from else known.split
        return Source(name, config or known.config, split or natural, field)
    if split is None:
        there = _hub_splits(name, config)
        order = ("test", "validation", held_out_from) if held_out_from else ("train",)
        split = next((s for s in order if s in there), there[0])
    return Source(name, config, split, field)


def _named(dataset: str, progress: Progress) -> str:
    if dataset != "auto":
        return dataset
    why = _hub_is_away()
    if why is None:
        return "fineweb-edu"
    progress.say(
        f"warning: {why}; calibrating on python-docs, the documentation of Python itself. "
        "For a model of general text give --dataset FILE"
    )
    return "python-docs"


def _hub_is_away() -> str | None:
    """Why nothing new can be read from the hub, or None."""
    if find_spec("datasets") is None:
        return "reading data sets from the hub needs the extra prunekit[data]"
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    if constants.HF_HUB_OFFLINE:
        return "the hub is switched off (HF_HUB_OFFLINE)"
    try:
        get_session().head(constants.ENDPOINT, timeout=PATIENCE)
    except Exception:  # whatever the reason, there is no hub
        return f"the hub did not answer within {PATIENCE:g} s"
    return None


# -- reading ------------------------------------------------------------------------------------------


def _plain_text(path: Path, field: str) -> Iterator[str]:
    with _opened(path) as file:
        yield from iter(lambda: file.read(SLICE), "")


def _json_lines(path: Path, field: str) -> Iterator[str]:
    def rows() -> Iterator[Any]:
        with _opened(path) as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    try:
                        yield json.loads(line)
                    except ValueError:
                        raise WrongInput(f"{path}, line {number}: not one JSON object per line") from None

    return _joined(rows(), field, str(path))


def _parquet(path: Path, field: str) -> Iterator[str]:
    try:
        from pyarrow import ArrowInvalid
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise ImportError(f"reading {path} needs pyarrow: pip install 'prunekit[data]'") from error
    try:
        file = ParquetFile(path)
    except ArrowInvalid:
        raise WrongInput(f"{path} is not a parquet file") from None
    if field not in file.schema_arrow.names:
        raise WrongInput(f"{path} has no field {field!r}; there are {', '.join(file.schema_arrow.names)}")
    rows = (row for batch in file.iter_batches(columns=[field]) for row in batch.to_pylist())
    return _joined(rows, field, str(path))


@contextmanager
def _opened(path: Path) -> Iterator[TextIO]:
    try:
        with path.open(encoding="utf-8") as file:
            yield file
    except UnicodeDecodeError as error:
        raise WrongInput(f"{path} is not UTF-8 text ({error.reason} at byte {error.start})") from None


_ROWS: Mapping[str, Callable[[Path, str], Iterator[str]]] = {
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".json": _json_lines,
    ".parquet": _parquet,
}


def _hub_rows(source: Source) -> Iterator[str]:
    from huggingface_hub import constants

    datasets = _datasets(source.dataset)
    known = KNOWN.get(source.dataset, Known(source.dataset))
    # offline only what was downloaded whole can be read
    streamed = known.streamed and not constants.HF_HUB_OFFLINE
    try:
        rows = datasets.load_dataset(known.path, source.config, split=source.split, streaming=streamed)
    except Exception as error:
        raise WrongInput(f"cannot read {source}: {first_line(error)}") from error
    return _joined(rows, source.field, str(source))


def _hub_splits(name: str, config: str | None) -> list[str]:
    datasets = _datasets(name)
    try:
        return datasets.get_dataset_split_names(name, config)
    except Exception as error:
        raise WrongInput(f"cannot read data set {name!r} from the hub: {first_line(error)}") from error


def _datasets(name: str) -> Any:
    """The library, when there is something for it to read: it would try a silent hub for half a minute."""
    try:
        import datasets
        from huggingface_hub import constants
    except ImportError as error:
        raise ImportError(f"data set {name!r} is read from the hub: pip install 'prunekit[data]'") from error
    if not constants.HF_HUB_OFFLINE and (why := _hub_is_away()):
        raise WrongInput(
            f"cannot read data set {name!r}: {why}; set HF_HUB_OFFLINE=1 to use what was downloaded before, "
            "or give a file"
        )
    return datasets


def _joined(rows: Iterable[Any], field: str, where: str) -> Iterator[str]:
    between = ""
    for row in rows:
        if not isinstance(row, Mapping) or not isinstance(row.get(field), str):
            there = ", ".join(map(str, row)) if isinstance(row, Mapping) else type(row).__name__
            raise WrongInput(f"{where}: no text in field {field!r}; there are {there}")
        yield between + row[field]
        between = BETWEEN


# -- cutting ------------------------------------------------------------------------------------------


def _read(
    tokenizer: Any, source: Source, windows: int, seqlen: int, progress: Progress
) -> Int64[Tensor, "windows seqlen"]:
    """At most `windows` windows from the start of the stream."""
    limit, ids = windows * seqlen, list[int]()
    with progress.stage(f"reading {source.label}", limit) as stage:
        for piece in _slices(source.texts()):
            new = tokenizer.encode(piece, add_special_tokens=False, verbose=False)
            stage.advance(min(len(new), limit - len(ids)))
            ids += new
            if len(ids) >= limit:
                break
    whole = min(len(ids) // seqlen, windows)
    return torch.tensor(ids[: whole * seqlen], dtype=torch.int64).reshape(whole, seqlen)


def _slices(texts: Iterable[str]) -> Iterator[str]:
    """The same stream in pieces of exactly SLICE characters; the last may be shorter."""
    kept, length = list[str](), 0
    for text in texts:
        kept.append(text)
        length += len(text)
        if length >= SLICE:
            whole = "".join(kept)
            for start in range(0, length - SLICE + 1, SLICE):
                yield whole[start : start + SLICE]
            kept = [whole[length - length % SLICE :]]
            length %= SLICE
    if length:
        yield "".join(kept)


def _seqlen(data: DataSpec, most: int | None) -> int:
    if data.seqlen is None:
        return min(LONGEST_WINDOW, most or LONGEST_WINDOW)
    if most is not None and data.seqlen > most:
        raise WrongInput(f"seqlen {data.seqlen} is longer than the model's {most} positions")
    return data.seqlen


def _windows(tokens: int, seqlen: int) -> int:
    return max(1, tokens // seqlen)


def _shares(
    asked: Mapping[str, int | None], pool: Tensor, seqlen: int, source: Source, progress: Progress
) -> dict[str, int]:
    """Windows for each part: what was asked for in full, the rest as near to the defaults as the text allows."""
    counts = {part: _windows(tokens or DEFAULTS[part], seqlen) for part, tokens in asked.items()}
    if sum(counts.values()) <= len(pool):
        return counts
    free = [part for part, tokens in asked.items() if tokens is None]
    left = len(pool) - sum(counts[part] for part in counts if part not in free)
    least = math.ceil(LEAST / seqlen)
    share = (left - least * len(free)) / max(1, sum(counts[part] - least for part in free))
    if not free or share < 0:
        need = {part: least if part in free else counts[part] for part in counts}
        parts = ", ".join(f"{part} {n * seqlen:,}" for part, n in need.items())
        raise WrongInput(
            f"too little text: {source} has {pool.numel():,} tokens in whole windows of {seqlen}; "
            f"{sum(need.values()) * seqlen:,} are needed ({parts})"
        )
    counts |= {part: least + int((counts[part] - least) * share) for part in free}
    progress.say(
        f"note: {source} has {pool.numel():,} tokens; of these "
        + ", ".join(f"{counts[part] * seqlen:,} for {part}" for part in counts)
    )
    return counts


def _check_vocabulary(batch: TokenBatch, vocab_size: int | None) -> None:
    if vocab_size is not None and int(batch.ids.max()) >= vocab_size:
        raise WrongInput(
            f"the tokenizer gives token id {int(batch.ids.max())}, the model knows {vocab_size}; "
            "give the tokenizer that belongs to the model"
        )
