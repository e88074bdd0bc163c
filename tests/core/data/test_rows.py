"""Local files as streams: what is read, and what is refused with its file, its row and what was found."""

import gzip
import json
import os
import threading
import tracemalloc
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prunekit import WrongInput
from prunekit.data import rows
from prunekit.data.rows import json_rows, kind, numbered, parquet_rows, text_pieces, what_is

ROWS = [{"text": f"{i} é 文 \U0001f600"} for i in range(300)]
LINES = "".join(json.dumps(row, ensure_ascii=i % 2 == 0) + "\n" for i, row in enumerate(ROWS))
EVERYTHING: Callable[[Sequence[str]], list[str]] = list


def written(folder: Path, content: str | bytes, name: str = "rows.jsonl") -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def values(path: Path) -> list[Any]:
    return [row for _, row in json_rows(path)]


@pytest.mark.parametrize(
    "content",
    [
        LINES,
        LINES.rstrip("\n"),
        "\ufeff" + LINES,
        LINES.replace("\n", "\r\n"),
        LINES.replace("\n", "\n \n\n"),
        gzip.compress(LINES.encode()),
        gzip.compress(b"\xef\xbb\xbf" + LINES.encode()),
        json.dumps(ROWS),
        "\n " + json.dumps(ROWS, indent=1) + "\n",
        gzip.compress(json.dumps(ROWS).encode()),
    ],
)
def test_rows_are_read_from_lines_and_arrays_with_marks_and_behind_gzip(tmp_path: Path, content: Any) -> None:
    assert values(written(tmp_path, content)) == ROWS


scalars = st.none() | st.floats(allow_nan=False) | st.integers() | st.text(max_size=8)


@given(st.lists(st.recursive(scalars, st.lists, max_leaves=8), min_size=1, max_size=6))
def test_an_array_is_read_however_it_is_cut(tmp_path_factory: pytest.TempPathFactory, array: list[Any]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rows, "CHUNK", 1)
        assert values(written(tmp_path_factory.mktemp("array"), json.dumps(array, indent=1))) == array


@given(st.binary(max_size=200), st.integers(0, len(LINES.encode())), st.booleans())
def test_any_bytes_are_rows_or_one_sentence(
    tmp_path_factory: pytest.TempPathFactory, wrong: bytes, at: int, packed: bool
) -> None:
    content = LINES.encode()[:at] + wrong + LINES.encode()[at:]
    path = written(tmp_path_factory.mktemp("any"), gzip.compress(content) if packed else content)
    for read in (json_rows, text_pieces):
        with suppress(WrongInput):  # and nothing else
            assert list(read(path))


def test_text_is_read_as_python_reads_it(tmp_path: Path) -> None:
    text = LINES * 40
    for content in (text, "\ufeff" + text, text.replace("\n", "\r\n"), gzip.compress(text.encode())):
        path = written(tmp_path, content, "a.txt")
        assert "".join(text_pieces(path)) == text


def test_a_named_pipe_that_nobody_writes_to_is_not_waited_for(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(rows, "PATIENCE", 0.1)
    pipe = tmp_path / "pipe.jsonl"
    os.mkfifo(pipe)
    with pytest.raises(WrongInput, match=r"pipe\.jsonl is a named pipe, and nothing came out of it for 0\.1 s"):
        values(pipe)
    writer = threading.Thread(target=pipe.write_text, args=(LINES,))
    writer.start()
    assert values(pipe) == ROWS
    writer.join()
    with pytest.raises(WrongInput, match="it is read once"):
        values(pipe)


def test_a_named_pipe_is_read_in_order(tmp_path: Path) -> None:
    for content in (LINES.encode(), gzip.compress(LINES.encode())):
        pipe = tmp_path / "pipe.jsonl"
        os.mkfifo(pipe)
        assert what_is(str(pipe)) == "file"
        writer = threading.Thread(target=pipe.write_bytes, args=(content,))
        writer.start()
        assert values(pipe) == ROWS
        writer.join()
        pipe.unlink()


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (LINES + "oh no\n" + LINES, r"rows\.jsonl, line 301: not one JSON object per line but 'oh no': Exp"),
        (LINES + '{"text": "cut', r"line 301: not one JSON object per line but '\{\"text\": \"cut'"),
        (LINES + '{"text": ' + "9" * 5_000 + "}", "line 301: not one JSON object per line but"),
        ('{"text": ' + "[" * 200_000 + "]" * 200_000 + "}", "line 1: nested too deeply"),
        ("[1, " + "[" * 200_000 + "]" * 200_000 + "]", "row 2: nested too deeply"),
        ('[{"a": 1}, {"a": oops}]', r"row 2: not one JSON value with a comma or \] behind it but '\{\"a\": oops\}"),
        ('[{"a": 1} {"a": 2}]', "row 1: not one JSON value with a comma"),
        ("[1, " + "9" * 5_000 + "]", "row 2: not one JSON value"),
        (json.dumps(ROWS)[:-1], "row 300: not one JSON value"),
        (json.dumps(ROWS) + LINES, "there is more behind its JSON array"),
        (gzip.compress(LINES.encode())[:-40], "cannot be read, or is damaged: Compressed file ended"),
        (gzip.compress(LINES.encode())[:200] + b"\0" * 200, "cannot be read, or is damaged"),
    ],
)
def test_what_is_no_row_is_named_with_its_place(tmp_path: Path, content: Any, sentence: str) -> None:
    with pytest.raises(WrongInput, match=sentence):
        values(written(tmp_path, content))


@pytest.mark.parametrize("before", ["", "é" * 5, "é" * 8_190, "a" * 8_191, "a" * 100_000, "文" * 70_001])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("wrong", [b"caf\xe9 ", b"\xff", b"\xf0\x9f\x98"])
def test_the_place_of_a_wrong_byte_is_told(tmp_path: Path, before: str, mark: bytes, wrong: bytes) -> None:
    right = mark + before.encode()
    at = len(right) + (3 if wrong.startswith(b"caf") else 0)
    for content, of in ((right + wrong, ";"), (gzip.compress(right + wrong), " of what gzip holds;")):
        with pytest.raises(WrongInput, match=f"is not UTF-8 text: .*, 0x{wrong[at - len(right)]:02x} at byte {at}{of}"):
            list(text_pieces(written(tmp_path, content, "a.txt")))


@pytest.mark.parametrize("content", ['{"text": "%s"}', '[{"text": "%s"}]', "%s"])
def test_a_row_without_an_end_takes_bounded_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str
) -> None:
    monkeypatch.setattr(rows, "LONGEST", 1_000_000)
    path = written(tmp_path, content % ("a" * 20_000_000))
    tracemalloc.start()
    with pytest.raises(WrongInput, match=r"(line|row) 1: more than 1,000,000 characters; divide it"):
        values(path)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 12_000_000


def test_a_row_of_too_many_lists_is_refused_before_it_is_parsed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rows, "MOST_PARTS", 1_000)
    for content in ('{"a": [%s]}', '[{"a": [%s]}'):
        with pytest.raises(WrongInput, match="1: more than 1,000 lists and objects"):
            values(written(tmp_path, content % ",".join(["[]"] * 100_000)))


@pytest.mark.parametrize("name", ["x" * 300, "/tmp/" + "y" * 5_000, "~nobody-of-this-name/x", "a\0b", "gone"])
def test_no_name_is_too_odd_to_ask(name: str) -> None:
    assert what_is(name) is None


def test_the_kind_stands_before_gz(tmp_path: Path) -> None:
    assert [kind(name) for name in ("a.jsonl", "a.JSONL.GZ", "a.txt.gz", "a.gz")] == [".jsonl", ".jsonl", ".txt", ""]
    assert what_is(str(tmp_path)) == "folder"


def test_rows_of_another_library_that_fail_are_named() -> None:
    def failing() -> Any:
        yield {"text": "a"}
        raise KeyError("shard")

    with pytest.raises(WrongInput, match=r"cannot read row 2 of owner/name: 'shard'"):
        list(numbered(failing(), "owner/name"))


def test_damaged_parquet_is_one_sentence(tmp_path: Path) -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "rows.parquet"
    parquet.write_table(pyarrow.table({"text": [row["text"] for row in ROWS]}), path)
    assert [row for _, row in parquet_rows(path, EVERYTHING)] == ROWS
    whole = path.read_bytes()
    for content in (b"", whole[:-50], whole[: len(whole) // 2] + whole[len(whole) // 2 + 100 :]):
        path.write_bytes(content)
        with pytest.raises(WrongInput, match=r"rows\.parquet is (not a parquet .* damaged|damaged behind row)"):
            list(parquet_rows(path, EVERYTHING))
    refused = 0
    for at in range(20, len(whole), len(whole) // 40):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 255]) + whole[at + 1 :])
        try:
            list(parquet_rows(path, EVERYTHING))
        except WrongInput:
            refused += 1
    assert refused


def test_parquet_is_not_read_from_a_stream(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    os.mkfifo(tmp_path / "rows.parquet")
    with pytest.raises(WrongInput, match="is a stream"):
        list(parquet_rows(tmp_path / "rows.parquet", EVERYTHING))
