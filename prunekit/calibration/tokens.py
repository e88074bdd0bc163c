"""From a data set's name to windows of token ids that calibration, search and evaluation never share.

Text is one stream, tokenised in slices of 100,000 characters without special tokens and cut into windows
of equal length. Stretches of that stream follow each other: calibration, search, evaluation; where a data
set has a held-out split, evaluation comes from there. Several data sets are cut each for itself and interleaved.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import torch
from jaxtyping import Bool, Int64
from torch import Tensor

from prunekit.errors import WrongInput, first_line
from prunekit.progress import Progress

if TYPE_CHECKING:
    from prunekit.recipe import DataSpec, TextSpec

SLICE = 100_000  # characters a tokenizer sees at a time
DEFAULTS = {"calibration": 131_072, "search": 131_072, "evaluation": 65_536}  # tokens
LEAST = 2_048  # tokens; with less than this in a part nobody asked for less, so we refuse
LONGEST_WINDOW = 2_048  # tokens, unless asked for
POOL = 16  # shuffled windows are drawn from up to this many times the text that is needed
PATIENCE = 3.0  # seconds to find out whether the hub answers
BETWEEN = "\n\n"  # documents, also the lines of wikitext, become one stream


@dataclass(frozen=True, eq=False)
class Answers:
    """What windows of questions ask: positions first … last - 1 of a window hold one choice, right or wrong."""

    question: Int64[Tensor, " windows"]  # ascending; the choices of a question stand side by side
    first: Int64[Tensor, " windows"]  # at least 1: an answer has a prompt before it
    last: Int64[Tensor, " windows"]  # padding from here on, which nothing before it sees
    right: Bool[Tensor, " windows"]

    def __getitem__(self, rows: Any) -> Answers:
        return Answers(self.question[rows], self.first[rows], self.last[rows], self.right[rows])


@dataclass(frozen=True, eq=False)
class TokenBatch:
    """Windows of token ids and where they are from."""

    ids: Int64[Tensor, "windows seqlen"]
    source: str  # a short label: wikitext2-test; several are joined by +
    origins: tuple[str, ...] = ()  # the label of every window, where there are several
    answers: Answers | None = None  # where the windows are questions, not running text

    @property
    def n_tokens(self) -> int:
        return self.ids.numel()

    @property
    def seqlen(self) -> int:
        return self.ids.shape[1]

    @cached_property
    def digest(self) -> str:
        """sha256 of the ids as little-endian int64, and of what is asked where the windows are questions."""
        asked = self.answers
        parts = [self.ids] if asked is None else [self.ids, asked.question, asked.first, asked.last, asked.right]
        digest = hashlib.sha256()
        for part in parts:
            digest.update(part.cpu().contiguous().numpy().astype("<i8", copy=False).tobytes())
        return digest.hexdigest()

    @cached_property
    def parts(self) -> Mapping[str, TokenBatch]:
        """The windows of every source by themselves, in the order of their first."""
        if not self.origins:
            return {self.source: self}
        return {
            name: replace(self._rows([i for i, origin in enumerate(self.origins) if origin == name]), source=name)
            for name in dict.fromkeys(self.origins)
        }

    def first(self, tokens: int | None) -> TokenBatch:
        """The first windows that hold at most `tokens` tokens, and whole questions; at least one. None: all."""
        if tokens is None or tokens >= self.n_tokens:
            return self
        count = max(1, tokens // self.seqlen)
        if self.answers is not None:  # back to where a question begins, or on to the end of the only one
            question = self.answers.question
            count = int((question < question[count]).sum()) or int((question == question[0]).sum())
        return self._rows(list(range(count)))

    def __len__(self) -> int:
        return len(self.ids)

    def _rows(self, rows: list[int]) -> TokenBatch:
        origins = tuple(self.origins[i] for i in rows) if self.origins else ()
        several = len(set(origins)) > 1
        return TokenBatch(
            self.ids[rows],
            self.source if several or not origins else origins[0],
            origins if several else (),
            None if self.answers is None else self.answers[rows],
        )


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

    @property
    def is_task(self) -> bool:
        """The text is a file of questions: its first row has a prompt."""
        path = Path(self.dataset).expanduser()
        if not is_file(self.dataset) or path.suffix.lower() not in _JSON:
            return False
        first = next(json_rows(path), None)
        return isinstance(first, Mapping) and "prompt" in first

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
    blends = _blends(data, progress)
    batches = _gathered(tokenizer, blends, data, _seqlen(data, max_seqlen), seed, progress)
    if data.contrast_dataset is not None:
        second = _source(_named(data.contrast_dataset, progress), None, None, data.field)
        count, seqlen = batches["calibration"].ids.shape
        windows = _read(tokenizer, second, count, seqlen, progress)
        _shares({"contrast": count}, {}, windows, seqlen, second, progress)
        batches["contrast"], blends["contrast"] = TokenBatch(windows, second.label), {second: Fraction(1)}
    for batch in batches.values():
        _check_vocabulary(batch, vocab_size)
    digests = {part: batch.digest for part, batch in batches.items()}
    for part, batch in batches.items():
        if batch.origins:
            digests |= {f"{part}/{label}": windows.digest for label, windows in batch.parts.items()}
    for part, digest in (data.digests or {}).items():
        if part in digests and digest != digests[part]:
            source = ", ".join(map(str, blends[part.split("/")[0]]))
            raise WrongInput(
                f"the recipe was made with other {part} tokens than {source} and this tokenizer give now "
                f"(sha256 {digests[part][:12]}…, not {digest[:12]}…); "
                "bring back the old text, or remove data.digests from the recipe"
            )
    spec = data.model_copy(
        update=_resolved(data, blends)
        | {"seqlen": batches["calibration"].seqlen, "digests": digests}
        | {f"{part}_tokens": batches[part].n_tokens for part in DEFAULTS}
    )
    return Draws(**batches, source=", ".join(map(str, blends["calibration"])), spec=spec)


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
    blends = {"evaluation": _blends(data, progress)["evaluation"]}
    batch = _gathered(tokenizer, blends, data, _seqlen(data, max_seqlen), 0, progress)["evaluation"]
    _check_vocabulary(batch, vocab_size)
    return batch


def overlap(one: TokenBatch, two: TokenBatch) -> bool:
    """Whether some window is in both; one stream is always cut at the same places."""
    return not set(map(tuple, one.ids.tolist())).isdisjoint(map(tuple, two.ids.tolist()))


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


Blend = Mapping[Source, Fraction]
"""The sources of one part with their shares, which add up to 1."""


def _blends(data: DataSpec, progress: Progress) -> dict[str, Blend]:
    """Part -> its sources; a part without a data set of its own has that of calibration, held out where it can be."""
    known: list[Source] = []  # one stream has one name, so that no two parts take the same stretch of it

    def found(text: TextSpec, held_out: bool) -> Source:
        name = _named(text.dataset, progress)
        same = next((source for source in known if _same(source.dataset, name)), None)
        if same is None:
            return _source(name, text.config, text.split, text.field or data.field, "train" if held_out else None)
        split = text.split or (None if held_out else same.split)
        return _source(same.dataset, text.config or same.config, split, same.field, same.split if held_out else None)

    def blend(texts: Iterable[TextSpec], held_out: bool = False) -> Blend:
        weights: dict[Source, Fraction] = {}
        for text in texts:
            source = found(text, held_out)
            if source in weights:
                raise WrongInput(f"{source} is given twice; give it once, with a weight")
            weights[source] = Fraction(str(text.weight))
        known.extend(source for source in weights if source not in known)
        return {source: weight / sum(weights.values()) for source, weight in weights.items()}

    calibration = blend(data.texts("dataset"))
    search = blend(data.texts("search_dataset")) or calibration
    evaluation = data.texts("evaluation_dataset") or [
        text.model_copy(update={"dataset": source.dataset, "config": source.config, "split": data.evaluation_split})
        for text, source in zip(data.texts("dataset"), calibration, strict=True)
    ]
    return {"calibration": calibration, "search": search, "evaluation": blend(evaluation, held_out=True)}


def _resolved(data: DataSpec, blends: Mapping[str, Blend]) -> dict[str, Any]:
    """The fields of `data` that say which text, with every choice made."""
    any_text = data.texts("dataset")[0]

    def written(part: str) -> tuple[TextSpec, ...]:
        whole = math.lcm(*(share.denominator for share in blends[part].values()))  # so that weights are exact
        values = [
            {
                "dataset": s.dataset,
                "config": s.config,
                "split": s.split,
                "field": s.field,
                "weight": float(share * whole),
            }
            for s, share in blends[part].items()
        ]
        return tuple(any_text.model_copy(update=value) for value in values)

    found: dict[str, Any] = {"search_dataset": written("search") if data.search_dataset is not None else None}
    if max(map(len, blends.values())) > 1:
        several = {"dataset": written("calibration"), "evaluation_dataset": written("evaluation")}
        return found | several | {"config": None, "split": None, "evaluation_split": None}
    (source,), (held_out,) = blends["calibration"], blends["evaluation"]
    found |= {"dataset": source.dataset, "config": source.config, "split": source.split}
    return found | {"evaluation_dataset": held_out.dataset, "evaluation_split": held_out.split}


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


def json_rows(path: Path) -> Iterator[Any]:
    """The values of a file with one JSON value per line.

    Raises:
        WrongInput: a line is something else.
    """
    with _opened(path) as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    yield json.loads(line)
                except ValueError:
                    raise WrongInput(f"{path}, line {number}: not one JSON object per line") from None


def _json_lines(path: Path, field: str) -> Iterator[str]:
    return _joined(json_rows(path), field, str(path))


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


_JSON = (".jsonl", ".ndjson", ".json")
_ROWS: Mapping[str, Callable[[Path, str], Iterator[str]]] = dict.fromkeys(_JSON, _json_lines) | {".parquet": _parquet}


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


def _gathered(
    tokenizer: Any, blends: Mapping[str, Blend], data: DataSpec, seqlen: int, seed: int, progress: Progress
) -> dict[str, TokenBatch]:
    """The windows of every part; no two parts share a window."""
    asked = {part: getattr(data, f"{part}_tokens") for part in blends}
    found: dict[str, TokenBatch] = {}
    for part in blends.keys() - {"search"}:
        if tasks := [source for source in blends[part] if source.is_task]:
            raise WrongInput(f"{tasks[0]} holds questions, which only judge; give it as data.search_dataset")
    if any(source.is_task for source in blends.get("search", ())):
        from prunekit.calibration.questions import drawn  # builds on this module

        tokens = asked["search"] or DEFAULTS["search"]
        found["search"] = drawn(tokenizer, blends["search"], tokens, seqlen, seed if data.shuffle else None)
    texts = {part: blend for part, blend in blends.items() if part not in found}
    orders = {part: in_shares(blend, _windows(asked[part] or DEFAULTS[part], seqlen)) for part, blend in texts.items()}
    pools: dict[Source, Tensor] = {}
    there: dict[Source, dict[str, int]] = {}  # windows for each part
    for source in dict.fromkeys(source for blend in texts.values() for source in blend):
        wanted = {part: orders[part].count(source) for part, blend in texts.items() if source in blend}
        pools[source] = _read(tokenizer, source, _reach(wanted, data), seqlen, progress)
        free = {part: texts[part][source] for part in wanted if asked[part] is None}
        there[source] = _shares(wanted, free, pools[source], seqlen, source, progress)
    for part, order in orders.items():  # no further than the first source that has no more
        ends = [_position(order, source, there[source][part]) for source in texts[part]]
        orders[part] = order[: min(ends)]
    stretches: dict[str, dict[Source, Tensor]] = {part: {} for part in texts}
    for source, pool in pools.items():
        counts = {part: orders[part].count(source) for part in there[source]}
        for part, windows in _cut(pool, counts, source, data, seqlen, seed).items():
            stretches[part][source] = windows
    return found | {part: _interleaved(orders[part], stretches[part]) for part in texts}


def in_shares(blend: Blend, n: int) -> list[Source]:
    """Whose turn it is, n times: after every turn each source has had its share as nearly as whole turns allow.

    The next is the one with the largest share / (2 turns + 1), Webster's rule.

    Raises:
        WrongInput: n turns are too few for the smallest share.
    """
    turns, order = dict.fromkeys(blend, 0), list[Source]()
    for _ in range(n):
        order.append(max(blend, key=lambda source: blend[source] / (2 * turns[source] + 1)))
        turns[order[-1]] += 1
    if none := [str(source) for source, count in turns.items() if not count]:
        raise WrongInput(f"{n} windows leave none for {none[0]}; give more tokens, shorter windows or another weight")
    return order


def _position(order: Sequence[Source], source: Source, n: int) -> int:
    """Where a source has its turn for the n-th time, counted from 0; the end where it has not."""
    return next(islice((i for i, turn in enumerate(order) if turn == source), n, None), len(order))


def _interleaved(order: Sequence[Source], stretches: Mapping[Source, Tensor]) -> TokenBatch:
    labels: dict[Source, str] = {}
    for source in stretches:
        alike = sum(source.label == other.label for other in labels)
        labels[source] = f"{source.label}-{alike + 1}" if alike else source.label
    left = {source: iter(windows) for source, windows in stretches.items()}
    ids = torch.stack([next(left[source]) for source in order])
    origins = tuple(labels[source] for source in order) if len(labels) > 1 else ()
    return TokenBatch(ids, "+".join(labels.values()), origins)


def _reach(windows: Mapping[str, int], data: DataSpec) -> int:
    """How many windows of a stream are looked at to take these."""
    if data.shuffle and windows.keys() != {"evaluation"}:
        return sum(windows.values()) * POOL
    return sum(windows.values()) + data.calibration_draw * windows.get("calibration", 0)


def _cut(
    pool: Tensor, counts: Mapping[str, int], source: Source, data: DataSpec, seqlen: int, seed: int
) -> dict[str, Int64[Tensor, "windows seqlen"]]:
    """Disjoint windows of one stream for each part."""
    pool = pool[: _reach(counts, data)]  # where a run with these counts, which reads no further, ends too
    c, s, e = (counts.get(part, 0) for part in DEFAULTS)
    if data.shuffle and counts.keys() != {"evaluation"}:
        # evaluation is the end of the pool, so that which windows it holds does not hang on the seed
        evaluation, rest = pool[len(pool) - e :], pool[: len(pool) - e]
        rest = rest[torch.randperm(len(rest), generator=torch.Generator().manual_seed(seed))]
    else:
        evaluation, rest = pool[c + s : c + s + e], torch.cat([pool[: c + s], pool[c + s + e :]])
    # draws after the first lie behind all else, so that search and evaluation are the same for every draw
    begin = c + s + (data.calibration_draw - 1) * c if data.calibration_draw else 0
    if begin + c > len(rest):
        raise WrongInput(
            f"too little text: {source} has {pool.numel():,} tokens in whole windows of {seqlen}, not enough for "
            f"data.calibration_draw {data.calibration_draw}; give more text, or fewer data.calibration_tokens"
        )
    parts = {"calibration": rest[begin : begin + c], "search": rest[c : c + s], "evaluation": evaluation}
    return {part: parts[part] for part in counts}


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
    wanted: Mapping[str, int],
    free: Mapping[str, Fraction],
    pool: Tensor,
    seqlen: int,
    source: Source,
    progress: Progress,
) -> dict[str, int]:
    """Windows for each part: what was asked for in full, the `free` rest as near to what is wanted as the text allows.

    `free` holds the share that the source has in those parts.
    """
    counts = dict(wanted)
    if sum(counts.values()) <= len(pool):
        return counts
    left = len(pool) - sum(counts[part] for part in counts if part not in free)
    least = {part: min(counts[part], math.ceil(LEAST * share / seqlen)) for part, share in free.items()}
    share = (left - sum(least.values())) / max(1, sum(counts[part] - least[part] for part in free))
    if not free or share < 0:
        need = counts | least
        parts = ", ".join(f"{part} {n * seqlen:,}" for part, n in need.items())
        raise WrongInput(
            f"too little text: {source} has {pool.numel():,} tokens in whole windows of {seqlen}; "
            f"{sum(need.values()) * seqlen:,} are needed ({parts})"
        )
    counts |= {part: least[part] + int((counts[part] - least[part]) * share) for part in free}
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
