"""What of a row is its text."""

from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prunekit import WrongInput
from prunekit.data.fields import Conversation, columns_of, content_of, has

KEYS = st.sampled_from(
    [
        "text",
        "messages",
        "conversations",
        "instruction",
        "input",
        "output",
        "role",
        "content",
        "from",
        "value",
        "a.b",
        "",
    ]
)
TALK = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
SHARED = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]
PARTS = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Hi"}]}, TALK[1]]


@pytest.mark.parametrize(
    ("row", "field", "text"),
    [
        ({"text": "a", "prompt": "b"}, None, "a"),
        ({"text": "a", "messages": TALK}, None, "a"),
        ({"text": "a", "prompt": "b"}, "prompt", "b"),
        ({"doc": {"text": "a"}}, "doc.text", "a"),
        ({"doc.text": "a", "doc": {"text": "b"}}, "doc.text", "a"),
        ({"a": "1", "b": {"c": "2"}}, "a,b.c", "1\n\n2"),
        ({"a": "1", "b": "2"}, "b, a", "2\n\n1"),
        ({"a,b": "1", "a": "2", "b": "3"}, "a,b", "1"),
        ({"a": "1", "b": None, "c": ""}, "a,b,c", "1"),
        ({"text": ""}, None, ""),
        ({"text": None}, None, None),
        ({"doc": None}, "doc.text", None),
        ({"a": None, "b": None}, "a,b", None),
        ({"messages": []}, None, None),
        ({"messages": [{"role": "user", "content": ""}, {"role": "assistant", "content": None}]}, None, None),
    ],
)
def test_text_is_found(row: Any, field: str | None, text: str | None) -> None:
    assert content_of(row, field, "rows, line 1") == text


@pytest.mark.parametrize(
    ("row", "field"),
    [
        ({"messages": TALK}, None),
        ({"text": None, "messages": TALK}, None),
        ({"conversations": SHARED}, None),
        ({"conversation": TALK}, None),
        ({"messages": PARTS}, None),
        ({"text": "a", "messages": TALK}, "messages"),
        ({"data": {"turns": SHARED}}, "data.turns"),
        ({"instruction": "Hi", "input": "", "output": "Hello"}, None),
        ({"instruction": "Hi", "output": "Hello"}, None),
    ],
)
def test_conversations_have_one_form(row: Any, field: str | None) -> None:
    found = content_of(row, field, "rows, line 1")
    assert isinstance(found, Conversation)
    assert list(found.messages) == TALK
    assert found.where.startswith("rows, line 1")


def test_the_input_of_an_instruction_belongs_to_the_question() -> None:
    found = content_of({"instruction": "Add", "input": "1 2", "output": "3"}, None, "here")
    assert isinstance(found, Conversation)
    assert [message["content"] for message in found.messages] == ["Add\n\n1 2", "3"]


@pytest.mark.parametrize(
    ("row", "field", "sentence"),
    [
        ({"id": 1, "body": "a"}, None, "no text in field 'text'; there are id, body; name it with data"),
        ({"messages": TALK}, "text", "no text in field 'text'; there are messages"),
        ({"text": ["a", "b"]}, None, "no text in field 'text'; it is a list"),
        ({"text": 3}, None, "no text in field 'text'; it is a number"),
        ({"text": True}, None, "it is true or false"),
        ({"text": {"a": 1}}, None, "it is an object"),
        ({"text": b"a"}, None, "it is bytes"),
        ({"a": "1", "b": TALK}, "a,b", "no text in field 'b'; it is a list"),
        ({"a": "1"}, "a,b", "no text in field 'b'; there are a"),
        ({"doc": "a"}, "doc.text", r"no text in field 'doc\.text'; there are doc"),
        ({"instruction": 1, "output": "a"}, None, "no text in field 'instruction'; it is a number"),
        ("a", None, "no text in field 'text'; the row is a text, not an object"),
        (None, "a", "no text in field 'a'; the row is null"),
        ([1], None, "the row is a list"),
        ({"messages": [TALK[0], {"role": "user"}, {"content": "a"}]}, None, "message 3 needs role and content"),
        ({"messages": [{"role": "user", "content": 3}]}, None, "message 1 needs role and content.*; there are role, "),
        ({str(i): i for i in range(1_000)}, None, "there are 0, 1, 2, .* and 988 more"),
    ],
)
def test_what_is_no_text_is_named(row: Any, field: str | None, sentence: str) -> None:
    with pytest.raises(WrongInput, match=f"^here.*{sentence}"):
        content_of(row, field, "here")


@pytest.mark.parametrize(
    ("field", "columns"),
    [
        (None, ["text", "messages", "instruction", "output"]),
        ("doc.text", ["doc"]),
        ("a.b", ["a.b"]),
        ("doc.text,text,doc.title", ["doc", "text"]),
    ],
)
def test_only_columns_that_are_needed_are_read(field: str | None, columns: list[str]) -> None:
    there = ["id", "a.b", "doc", "output", "instruction", "messages", "text"]
    assert columns_of(field, there, "rows") == columns
    with pytest.raises(WrongInput, match="rows has no field 'gone'; there are id, a"):
        columns_of("gone", there, "rows")
    with pytest.raises(WrongInput, match="rows has no field 'text'; there are id"):
        columns_of(None, ["id"], "rows")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=4),
    max_leaves=8,
)


@given(JSON | st.dictionaries(KEYS, JSON), st.none() | KEYS | st.just("text,messages.role"))
def test_every_row_is_text_or_a_conversation_or_one_sentence(row: Any, field: str | None) -> None:
    with suppress(WrongInput):  # and nothing else
        found = content_of(row, field, "here")
        assert isinstance(found, str | Conversation | None)
        if isinstance(found, Conversation):
            assert all(isinstance(m["role"], str) and m["content"] for m in found.messages)


def test_a_row_has_a_field_also_when_it_is_null() -> None:
    row = {"a": None, "b": {"c": 1}}
    assert all(has(row, field) for field in ("a", "b.c", "a,b"))
    assert not any(has(row, field) for field in ("c", "b.d", "a,c"))
    assert not has([], "a")
