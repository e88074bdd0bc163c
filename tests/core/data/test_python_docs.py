"""python-docs gives the same documents in disjoint splits, from whatever standard library it finds."""

import sys
from pathlib import Path
from typing import get_args

import pytest

from prunekit.data import python_docs
from prunekit.data.python_docs import Split, text
from prunekit.errors import WrongInput

SPLITS: tuple[Split, ...] = get_args(Split)


fresh_reading = python_docs._documents.__wrapped__  # past the cache


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty standard library in place of the real one; the topics stay."""
    monkeypatch.setattr(python_docs.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    return tmp_path


def test_no_document_is_in_two_splits() -> None:
    documents = [document for split in SPLITS for document in python_docs._documents()[split]]
    assert len(documents) == len(set(documents))


def test_no_long_paragraph_is_in_two_documents() -> None:
    paragraphs = [
        " ".join(paragraph.split())
        for split in SPLITS
        for document in python_docs._documents()[split]
        for paragraph in set(document.split("\n\n"))
    ]
    long = [paragraph for paragraph in paragraphs if len(paragraph) >= python_docs.SHORTEST_REPEAT]
    assert len(long) == len(set(long))


@pytest.mark.slow
def test_a_fresh_reading_gives_the_same_documents() -> None:
    assert fresh_reading() == python_docs._documents()


def test_documents_are_sorted_by_their_hash() -> None:
    for documents in python_docs._documents().values():
        digests = [python_docs._digest(document) for document in documents]
        assert digests == sorted(digests)


def test_a_split_is_its_documents_joined_by_blank_lines() -> None:
    for split in SPLITS:
        assert text(split) == "\n\n".join(python_docs._documents()[split])


def test_splits_have_their_share_of_a_large_text() -> None:
    sizes = {split: len(text(split)) for split in SPLITS}
    total = sum(sizes.values())
    assert total > 1_000_000
    assert sizes["train"] == pytest.approx(0.9 * total, rel=0.05)
    assert sizes["validation"] == pytest.approx(0.05 * total, rel=0.5)
    assert sizes["test"] == pytest.approx(0.05 * total, rel=0.5)


def test_docstrings_are_found_wherever_they_are_defined_and_broken_files_are_passed_over(library: Path) -> None:
    (library / "a.py").write_text(
        '"""One."""\nif x:\n    class A:\n        """Two."""\n        async def f(self):\n            """Three."""\n'
    )
    (library / "b.py").write_text("def broken(:")
    (library / "c.py").write_bytes(b'"""\xff"""')
    (library / "test").mkdir()
    (library / "test" / "d.py").write_text('"""Four."""')
    assert [found for found in python_docs._docstrings() if found] == ["One.", "Two.", "Three."]


def test_cleaning_keeps_new_prose_only() -> None:
    prose = "The statement is used for conditional execution of a suite of statements."
    code = ">>> a[0] = f(1)\n>>> b[0] = f(2)\n>>> c[0] = f(3)\n>>> d[0] = f(4)\n>>> e[0]"
    assert list(python_docs._cleaned([prose, f"  {prose}\n", f"Title\n\n{prose}", code, "Too short."])) == [prose]


def test_too_little_text_says_what_there_is_and_what_to_do(library: Path) -> None:
    with pytest.raises(WrongInput, match=r"needs at least 500,000 characters.*carries.*Use a full CPython"):
        fresh_reading()


def test_missing_topics_say_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(WrongInput, match=r"pydoc_data\.topics.*Install the full standard library"):
        fresh_reading()


def test_an_unknown_split_names_those_there_are() -> None:
    with pytest.raises(WrongInput, match="no split 'dev' of python-docs; there are train, validation, test"):
        text("dev")  # pyright: ignore[reportArgumentType]
