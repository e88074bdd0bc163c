"""What of a row is its text: one field, several, or the messages of a conversation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from prunekit.errors import WrongInput

BETWEEN = "\n\n"  # documents, also the lines of wikitext, become one stream
CHATS = ("messages", "conversations", "conversation")
INSTRUCTION, INPUT, OUTPUT = "instruction", "input", "output"  # as of Alpaca
_ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant", "observation": "tool"}
_NAMES = {str: "a text", list: "a list", dict: "an object", bool: "true or false", type(None): "null"}
_SHOWN = 12  # fields that a message names
_MISSING = object()


@dataclass(frozen=True)
class Conversation:
    """Messages {role, content}, and where they stand."""

    messages: Sequence[Mapping[str, str]]
    where: str


def has(row: Any, field: str) -> bool:
    """Whether a row has all that a field names."""
    return isinstance(row, Mapping) and all(_found(row, part) is not _MISSING for part in _parts(row, field))


def columns_of(field: str | None, there: Sequence[str], where: str) -> list[str]:
    """The columns to read, of those that there are.

    Raises:
        WrongInput: one is not there.
    """
    if field is None:
        known = [name for name in ("text", *CHATS, INSTRUCTION, INPUT, OUTPUT) if name in there]
        missing = [] if known else ["text"]
    else:
        known = [part if part in there else part.split(".")[0] for part in _parts(dict.fromkeys(there), field)]
        missing = [name for name in known if name not in there]
    if missing:
        raise WrongInput(f"{where} has no field {missing[0]!r}; there are {_listed(there)}")
    return list(dict.fromkeys(known))


def content_of(row: Any, field: str | None, where: str) -> str | Conversation | None:
    """The text of a row.

    Args:
        row: an object.
        field: `a`; `a.b`, which is inside another; several by comma, which are joined by blank lines. None: the first
            that there is of text, messages, conversations, and instruction with input and output.
        where: the row stands, for messages.

    Returns:
        A text or a conversation; None where it is null.

    Raises:
        WrongInput: there is no such field, or no text in it.
    """
    if not isinstance(row, Mapping):
        raise WrongInput(f"{where}: no text in field {field or 'text'!r}; the row is {_name(row)}, not an object")
    if field is None:
        field = next((name for name in ("text", *CHATS) if row.get(name) is not None), None)
        if field is None and has(row, INSTRUCTION) and has(row, OUTPUT):
            return _instruction(row, where)
        field = field or next((name for name in CHATS if name in row), None)  # that is null
    parts = _parts(row, field or "text")
    values = [_found(row, part) for part in parts]
    how = "; name it with data.field, as a, a.b or a,b"
    for part, value in zip(parts, values, strict=True):
        if value is _MISSING:
            raise WrongInput(f"{where}: no text in field {part!r}; there are {_listed(row)}{how}")
        if len(parts) == 1 and isinstance(value, list) and all(isinstance(message, Mapping) for message in value):
            return _conversation(value, f"{where}, field {part!r}")
        if value is not None and not isinstance(value, str):
            raise WrongInput(f"{where}: no text in field {part!r}; it is {_name(value)}{how}")
    return None if values.count(None) == len(values) else BETWEEN.join(value for value in values if value)


def _conversation(messages: Sequence[Mapping[str, Any]], where: str) -> Conversation | None:
    found = list[dict[str, str]]()
    for number, message in enumerate(messages, 1):
        role = message.get("role", message.get("from"))
        content = message.get("content", message.get("value"))
        if isinstance(content, list):  # of parts, among them images
            content = "".join(p["text"] for p in content if isinstance(p, Mapping) and isinstance(p.get("text"), str))
        if not isinstance(role, str) or not isinstance(content, str | None):
            raise WrongInput(
                f"{where}: message {number} needs role and content, or from and value, as texts; there are "
                f"{_listed(message)}"
            )
        if content:
            found.append({"role": _ROLES.get(role, role), "content": content})
    return Conversation(found, where) if found else None


def _instruction(row: Mapping[str, Any], where: str) -> Conversation | None:
    texts = {name: row.get(name) for name in (INSTRUCTION, INPUT, OUTPUT)}
    if wrong := [name for name, text in texts.items() if not isinstance(text, str | None)]:
        raise WrongInput(f"{where}: no text in field {wrong[0]!r}; it is {_name(texts[wrong[0]])}")
    asked = BETWEEN.join(text for name in (INSTRUCTION, INPUT) if (text := texts[name]))
    messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": texts[OUTPUT]}]
    return _conversation(messages, where)


def _parts(row: Mapping[str, Any], field: str) -> list[str]:
    return [field] if field in row else [part.strip() for part in field.split(",")]


def _found(row: Mapping[str, Any], part: str) -> Any:
    """A value, by its name or by a dotted path to it; null inside of null."""
    if part in row:
        return row[part]
    value: Any = row
    for name in part.split("."):
        if value is None:
            return None
        if not isinstance(value, Mapping) or name not in value:
            return _MISSING
        value = value[name]
    return value


def _listed(names: Any) -> str:
    shown = [str(name)[: _SHOWN * 4] for name in names]
    more = f" and {len(shown) - _SHOWN:,} more" if len(shown) > _SHOWN else ""
    return (", ".join(shown[:_SHOWN]) or "none") + more


def _name(value: Any) -> str:
    return _NAMES.get(type(value), "a number" if isinstance(value, int | float) else f"{type(value).__name__}")
