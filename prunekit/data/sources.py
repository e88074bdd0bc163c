"""From a data set's name to one stream of text: python-docs, local files, the hub."""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from huggingface_hub import constants

from prunekit.data import python_docs
from prunekit.data.fields import BETWEEN, Conversation, columns_of, content_of, has
from prunekit.data.rows import JSON, PARQUET, YAML, Row, json_rows, kind, numbered, parquet_rows, text_pieces, what_is
from prunekit.data.spec import TextSpec
from prunekit.errors import WrongInput, first_line
from prunekit.system.files import check_name
from prunekit.system.progress import Progress

SLICE = 100_000  # characters a tokenizer sees at a time
PATIENCE = 3.0  # seconds to find out whether the hub answers
TABLES = (".csv", ".tsv")  # of which only the text is read
NAMES_A_TASK = re.compile(r"^task\s*:", re.MULTILINE)  # a key of a YAML file
FORMS = "a text, .jsonl, .json or .parquet file"
Chat = Callable[[Conversation], "str | list[int]"]


@dataclass(frozen=True)
class Source:
    """One stream of text."""

    dataset: str
    config: str | None
    split: str | None
    field: str | None  # of rows; None: what there is, as of `content_of`

    @property
    def label(self) -> str:
        """Short, for the keys of results."""
        name = Path(self.dataset).stem if is_file(self.dataset) else self.dataset.replace("/", "--")
        return "-".join(part for part in (name, self.split) if part)

    @property
    def is_task(self) -> bool:
        """The text is a file of questions: a task of lm-evaluation-harness, or rows with a prompt and an answer.

        Not where its first row has a field that is asked for.
        """
        if kind(self.dataset) in YAML and is_file(self.dataset):
            return any(NAMES_A_TASK.search(piece) for piece in text_pieces(Path(self.dataset).expanduser()))
        row = self.first_row
        asks = has(row, "prompt") and (has(row, "answer") or has(row, "choices"))
        return asks and (self.field is None or not has(row, self.field))

    @property
    def first_row(self) -> Any:
        """Of a file of JSON; None: there is none, or it could not be read again."""
        path = Path(self.dataset).expanduser()
        if not is_file(self.dataset) or kind(path) not in JSON or not path.is_file():
            return None
        return next(json_rows(path), ("", None))[1]

    def __str__(self) -> str:
        field = f", field {self.field!r}" if self.field is not None else ""
        if is_file(self.dataset):
            return f"{self.dataset}{field if kind(self.dataset) in (*JSON, PARQUET) else ''}"
        if self.dataset == "python-docs":
            return f"python-docs, split {self.split!r}"
        config = f", config {self.config!r}" if self.config else ""
        return f"{self.dataset}{config}, split {self.split!r}{field}"

    def pieces(self, chat: Chat, met: Counter[str]) -> Iterator[str | list[int]]:
        """Pieces of the stream, read as they are asked for.

        Args:
            chat: from a conversation to token ids or text.
            met: counts rows, and those that were empty, as they are read.
        """
        if self.dataset == "python-docs":
            return iter([python_docs.text(self.split)])  # type: ignore[arg-type]
        if not is_file(self.dataset):
            return _joined(_hub_rows(self), self.field, chat, met, keep_empty=True)  # as wikitext is measured
        path = Path(self.dataset).expanduser()
        if kind(path) in JSON:
            return _joined(json_rows(path), self.field, chat, met)
        if kind(path) == PARQUET:
            rows = parquet_rows(path, lambda there: columns_of(self.field, there, str(path)))
            return _joined(rows, self.field, chat, met)
        return text_pieces(path)


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
GENERAL = (  # web pages, conversations, programs and mathematics, in equal shares
    TextSpec(dataset="fineweb-edu"),
    TextSpec(dataset="HuggingFaceTB/smol-smoltalk", split="train", field="messages"),
    TextSpec(dataset="codeparrot/codeparrot-clean-valid", split="train", field="content"),
    TextSpec(dataset="HuggingFaceTB/finemath", config="finemath-4plus", split="train", field="text"),
)
NAMES = ("auto", "general", "python-docs", *KNOWN)


def is_file(dataset: str) -> bool:
    """The name is that of a local file or a named pipe; raises when it can only be one and is not there.

    Raises:
        WrongInput: no such file, or a folder.
    """
    if dataset in NAMES:
        return False
    check_name(dataset)
    path, there = Path(dataset), what_is(dataset)
    if there == "file":
        return True
    if there == "folder":
        raise WrongInput(f"data set {dataset!r} is a folder; give {FORMS}")
    looks_like_file = kind(path) in {".txt", ".text", ".md", *JSON, *YAML, PARQUET} or path.suffix.lower() == ".gz"
    if looks_like_file or dataset.startswith((".", "/", "~")) or dataset.count("/") > 1:
        raise WrongInput(f"no file {dataset!r}; give {FORMS}, or one of {', '.join(NAMES)}")
    if "/" not in dataset:
        near = difflib.get_close_matches(dataset, NAMES, n=1)
        guess = f"did you mean {near[0]!r}? " if near else ""
        raise WrongInput(
            f"no data set {dataset!r}; {guess}there are {', '.join(NAMES)}, local files, and owner/name on the hub"
        )
    return False


def same_data(one: str, two: str) -> bool:
    """Two names of one data set."""
    if is_file(one) and is_file(two):
        return Path(one).expanduser().samefile(Path(two).expanduser())
    return len({KNOWN[name].path if name in KNOWN else name for name in (one, two)}) == 1


def spread_out(texts: Iterable[TextSpec]) -> list[TextSpec]:
    """Put the data sets that `general` stands for in its place; they share its weight.

    Raises:
        WrongInput: it was given a config, a split or a field.
    """
    found = list[TextSpec]()
    for text in texts:
        if text.dataset != "general":
            found.append(text)
        elif text.config or text.split or text.field:
            raise WrongInput(
                "data set 'general' is several, which have their own config, split and field; leave these away, or "
                "list the data sets one by one"
            )
        else:
            found += [one.model_copy(update={"weight": text.weight / len(GENERAL)}) for one in GENERAL]
    return found


def source_of(
    name: str, config: str | None, split: str | None, field: str | None, held_out_from: str | None = None
) -> Source:
    """A stream with its split chosen.

    Args:
        name: of a data set, or a file.
        config: of a data set on the hub; None: its usual one.
        split: None: train, or the first there is.
        field: of rows that holds the text; None: what there is.
        held_out_from: the split that others read: with it a held-out split is chosen, or this one where there is none.

    Raises:
        WrongInput: no such data set, or a split or config of a file.
    """
    if is_file(name):
        if field is not None and kind(name) in TABLES:
            raise WrongInput(
                f"{name} is read as one text, which has no field {field!r}; save its rows as .jsonl or .parquet, "
                "or leave data.field away"
            )
        if split or config:
            raise WrongInput(f"a file has no split or config; {name!r} was asked for {split or config!r}")
        return Source(name, None, None, field)
    if name == "general":
        raise WrongInput("data set 'general' is several data sets; here one is read, so give the name of one")
    if name == "python-docs":
        return Source(name, None, split or ("test" if held_out_from else "train"), None)
    known = KNOWN.get(name)
    if known is not None:
        natural = (known.held_out or held_out_from) if held_out_from else known.split
        return Source(name, config or known.config, split or natural, field)
    if split is None:
        there = _hub_splits(name, config)
        order = ("test", "validation", held_out_from) if held_out_from else ("train",)
        split = next((s for s in order if s in there), there[0])
    return Source(name, config, split, field)


def named(dataset: str, progress: Progress) -> str:
    """The data set that `auto` stands for, with a warning where the hub cannot be read; others are themselves."""
    if dataset != "auto":
        return dataset
    why = hub_is_away()
    if why is None:
        return "fineweb-edu"
    progress.say(
        f"warning: {why}; calibrating on python-docs, the documentation of Python itself. "
        "For a model of general text give --dataset FILE"
    )
    return "python-docs"


def hub_is_away() -> str | None:
    """Say why nothing new can be read from the hub; None where it can."""
    if find_spec("datasets") is None:
        return "reading data sets from the hub needs the extra prunekit[data]"
    from huggingface_hub.utils import get_session

    if constants.HF_HUB_OFFLINE:
        return "the hub is switched off (HF_HUB_OFFLINE)"
    try:
        get_session().head(constants.ENDPOINT, timeout=PATIENCE)
    except Exception:  # whatever the reason, there is no hub
        return f"the hub did not answer within {PATIENCE:g} s"
    return None


def slices(texts: Iterable[str]) -> Iterator[str]:
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


# -- reading ------------------------------------------------------------------------------------------


def _hub_rows(source: Source) -> Iterator[Row]:
    datasets = _datasets(source.dataset)
    known = KNOWN.get(source.dataset, Known(source.dataset))
    # offline only what was downloaded whole can be read
    streamed = known.streamed and not constants.HF_HUB_OFFLINE
    try:
        rows = datasets.load_dataset(known.path, source.config, split=source.split, streaming=streamed)
    except Exception as error:
        raise WrongInput(f"cannot read {source}: {first_line(error)}") from error
    return numbered(iter(rows), str(source))


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
    except ImportError as error:
        raise ImportError(f"data set {name!r} is read from the hub: pip install 'prunekit[data]'") from error
    if not constants.HF_HUB_OFFLINE and (why := hub_is_away()):
        raise WrongInput(
            f"cannot read data set {name!r}: {why}; set HF_HUB_OFFLINE=1 to use what was downloaded before, "
            "or give a file"
        )
    return datasets


def _joined(
    rows: Iterable[Row], field: str | None, chat: Chat, met: Counter[str], keep_empty: bool = False
) -> Iterator[str | list[int]]:
    """What rows hold, with blank lines between texts."""
    between = ""
    for where, row in rows:
        met["rows"] += 1
        piece = content_of(row, field, where)
        if isinstance(piece, Conversation):
            met["conversations"] += 1
            piece = chat(piece)
        if piece is None or (not piece and not keep_empty):
            met["empty"] += 1
            continue
        yield between + piece if isinstance(piece, str) else piece
        between = BETWEEN if isinstance(piece, str) else ""
