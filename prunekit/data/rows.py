"""Local files, read as streams: UTF-8 text, rows of JSON, rows of parquet; the first two also behind gzip."""

from __future__ import annotations

import gzip
import io
import json
import os
import re
import select
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any, Literal, TextIO

from prunekit.errors import WrongInput, first_line

PATIENCE = 30.0  # seconds until something comes out of a named pipe
CHUNK = 100_000  # characters that are read at a time
LONGEST = 2**24  # characters of one row
MOST_PARTS = 1_000_000  # lists and objects in one row, each of which takes 25 times the memory of its text
SHOWN = 60  # characters of a broken row that a message repeats

Row = tuple[str, Any]
"""Where a row stands, for messages, and its value."""

JSON = (".jsonl", ".ndjson", ".json")
PARQUET = ".parquet"
YAML = (".yaml", ".yml")  # of tasks of lm-evaluation-harness
_GZIP = b"\x1f\x8b"
_WORD = len("-Infinity")  # the longest that is cut as a whole
_SPACE = re.compile(r"\s*")


def kind(path: str | Path) -> str:
    """The suffix that says what a file holds: that before .gz."""
    return Path(str(path).lower().removesuffix(".gz")).suffix


def what_is(name: str) -> Literal["file", "folder"] | None:
    """What has this name; a named pipe is a file. No name is too long to ask."""
    try:
        path = Path(name).expanduser()
        return "file" if path.is_file() or path.is_fifo() else "folder" if path.is_dir() else None
    except (OSError, RuntimeError, ValueError):  # nor is there a home of everybody
        return None


def text_pieces(path: Path) -> Iterator[str]:
    """The text of a file.

    Raises:
        WrongInput: it is no UTF-8, or cannot be read.
    """
    with _opened(path) as file:
        yield from iter(lambda: file.read(CHUNK), "")


def json_rows(path: Path) -> Iterator[Row]:
    """The rows of a file with one JSON value per line, or with one JSON array.

    Raises:
        WrongInput: a row is something else, or has more than `LONGEST` characters; or as of `text_pieces`.
    """
    with _opened(path) as file:
        lines, rows = iter(lambda: file.readline(LONGEST + 1), ""), 0
        for number, line in enumerate(lines, 1):
            if rows == 0 and line.lstrip().startswith("["):
                yield from _elements(file, line, path)
                return
            _check_size(line, f"{path}, line {number}")
            if not line.isspace():
                rows += 1
                yield f"{path}, line {number}", _parsed(json.loads, line, f"{path}, line {number}")


def parquet_rows(path: Path, choose: Callable[[Sequence[str]], list[str]]) -> Iterator[Row]:
    """The rows of a parquet file.

    Args:
        path: of the file.
        choose: of the names of all columns, those to read.

    Raises:
        WrongInput: it is none, or is damaged.
    """
    try:
        from pyarrow import ArrowInvalid
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise ImportError(f"reading {path} needs pyarrow: pip install 'prunekit[data]'") from error
    if not path.is_file():
        raise WrongInput(f"{path} is a stream, and parquet is not read in order; save it to a file")
    try:
        file = ParquetFile(path)
    except PermissionError:
        raise
    except (ArrowInvalid, OSError) as error:
        raise WrongInput(f"{path} is not a parquet file, or is damaged: {first_line(error)}") from None
    columns, number = choose(file.schema_arrow.names), 0
    batches = file.iter_batches(batch_size=1_000, columns=columns)  # small ones: rows may be whole books
    while True:
        try:
            batch = next(batches, None)
            rows = [] if batch is None else batch.to_pylist()
        except Exception as error:  # what a damaged page makes of any decoder
            raise WrongInput(f"{path} is damaged behind row {number}: {first_line(error)}") from None
        if batch is None:
            return
        for row in rows:
            number += 1
            yield f"{path}, row {number}", row


def numbered(rows: Iterator[Any], where: str) -> Iterator[Row]:
    """Rows that another library reads.

    Raises:
        WrongInput: it could not.
    """
    for number in count(1):
        try:
            row = next(rows)
        except StopIteration:
            return
        except Exception as error:  # of the network, of any file format
            raise WrongInput(f"cannot read row {number} of {where}: {first_line(error)}") from error
        yield f"{where}, row {number}", row


# -- JSON ---------------------------------------------------------------------------------------------


def _parsed(parse: Callable[..., Any], text: str, where: str, *more: Any) -> Any:
    try:
        return parse(text, *more)
    except RecursionError:
        raise WrongInput(f"{where}: nested too deeply to be a row of text") from None
    except ValueError as error:
        found = text.strip()[:SHOWN]
        raise WrongInput(f"{where}: not one JSON object per line but {found!r}: {first_line(error)}") from None


def _check_size(text: str, where: str) -> None:
    if len(text) > LONGEST:
        raise WrongInput(f"{where}: more than {LONGEST:,} characters; divide it into rows")
    if len(text) > MOST_PARTS < text.count("[") + text.count("{"):
        raise WrongInput(f"{where}: more than {MOST_PARTS:,} lists and objects; divide it into rows of text")


def _elements(file: TextIO, text: str, path: Path) -> Iterator[Row]:
    """The values of one array, of which no more than one is held."""
    decode = json.JSONDecoder().raw_decode
    at = text.index("[") + 1
    for number in count(1):
        where = f"{path}, row {number}"
        while True:
            at = _end_of_space(text, at)
            if text[at : at + 1] == "]":
                if text[at + 1 :].strip() or file.read(CHUNK).strip():
                    raise WrongInput(
                        f"{path}: there is more behind its JSON array; give one array, or one row per line"
                    )
                return
            try:
                value, end = decode(text, at)
                after = _end_of_space(text, end)
                if text[after : after + 1] in (",", "]"):
                    break
                broken = after < len(text) - _WORD  # else it may go on, as 0.5 does behind 0.
            except RecursionError:
                raise WrongInput(f"{where}: nested too deeply to be a row of text") from None
            except json.JSONDecodeError as error:  # at the end it may only be cut
                broken = error.pos < len(text) - _WORD and not error.msg.startswith("Unterminated string")
            except ValueError:  # a number of thousands of digits
                broken = True
            text, at = text[at:], 0
            _check_size(text, where)
            if broken or not (more := file.read(max(CHUNK, len(text)))):
                raise WrongInput(f"{where}: not one JSON value with a comma or ] behind it but {text[:SHOWN]!r}")
            text += more
        yield where, value
        at = after + (text[after] == ",")


def _end_of_space(text: str, at: int) -> int:
    found = _SPACE.match(text, at)
    assert found is not None
    return found.end()


# -- bytes --------------------------------------------------------------------------------------------


class _Counted(io.BufferedReader):
    """Counts the bytes it has handed out, as streams have no `tell`."""

    handed = 0

    def read1(self, size: int = -1, /) -> bytes:
        found = super().read1(size)
        self.handed += len(found)
        return found


def _of_pipe(path: Path) -> int:
    """Open a named pipe to which somebody writes; to wait for that has an end."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    if not select.select([descriptor], [], [], PATIENCE)[0]:
        os.close(descriptor)
        raise WrongInput(
            f"{path} is a named pipe, and nothing came out of it for {PATIENCE:g} s; it is read once, "
            "so save its text to a file where it is needed again"
        )
    os.set_blocking(descriptor, True)
    return descriptor


@contextmanager
def _opened(path: Path) -> Iterator[TextIO]:
    try:
        with os.fdopen(_of_pipe(path), "rb") if path.is_fifo() else path.open("rb") as stored:
            packed = stored.peek(2)[:2] == _GZIP
            content = _Counted(gzip.GzipFile(fileobj=stored) if packed else stored)  # type: ignore[arg-type]
            try:
                with io.TextIOWrapper(content, encoding="utf-8-sig") as file:
                    yield file
            except UnicodeDecodeError as error:
                at = content.handed - len(error.object) + error.start
                raise WrongInput(
                    f"{path} is not UTF-8 text: {error.reason}, 0x{error.object[error.start]:02x} at byte {at}"
                    f"{' of what gzip holds' if packed else ''}; save it as UTF-8"
                ) from None
    except PermissionError:
        raise
    except (OSError, EOFError, zlib.error) as error:
        raise WrongInput(f"{path} cannot be read, or is damaged: {first_line(error)}") from None
