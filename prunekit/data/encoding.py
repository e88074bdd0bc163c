"""From text and conversations to token ids, such that no text becomes a special token by spelling one."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from prunekit.data.fields import BETWEEN, Conversation
from prunekit.data.spec import WindowStart
from prunekit.errors import WrongInput, first_line

LONGEST_CHAT = 1_000_000  # characters; a chat template takes a conversation whole
LONE = re.compile("[\ud800-\udfff]")  # half a character: JSON can say it, UTF-8 and tokenizers cannot
ANY_TEXT = "A text."  # that shows what a tokenizer puts in front of one
# templates that write today's date would give other tokens tomorrow
DATE = "{%- macro strftime_now(format) -%}26 Jul 2024{%- endmacro -%}"


class Encoder:
    """A tokenizer, and whether text may spell its special tokens."""

    def __init__(self, tokenizer: Any, special_tokens: bool = False) -> None:
        self.tokenizer, self.allowed = tokenizer, special_tokens
        added: Mapping[int, Any] = getattr(tokenizer, "added_tokens_decoder", {})
        special = {token.content for token in added.values() if token.special}
        special |= set(getattr(tokenizer, "all_special_tokens", ()))
        self._special = _any_of(special)
        self._ids = {tokenizer.convert_tokens_to_ids(token) for token in special}
        self._ids -= {getattr(tokenizer, "unk_token_id", None)}
        # those that are ordinary entries of the vocabulary too
        self._produced = _any_of(
            token for token in special if tokenizer.convert_tokens_to_ids(token) in self._encode(token, apart=True)
        )

    @property
    def chats(self) -> bool:
        """Whether it knows how its model was shown conversations."""
        return bool(getattr(self.tokenizer, "chat_template", None))

    def __call__(self, text: str) -> list[int]:
        """Encode text, without special tokens unless it may spell them."""
        text = LONE.sub("\ufffd", text)
        if self.allowed or not self._special.search(text):
            ids = self._encode(text)  # not apart: a slow tokenizer would forget what else was added to it
            if self.allowed or self._ids.isdisjoint(ids):  # some are matched in what a normalizer makes of the text
                return ids
        return self._encode(self._broken(text), apart=True)

    def chat(self, conversation: Conversation) -> list[int] | str:
        """Render a conversation by the chat template; its messages joined by blank lines where there is none.

        Raises:
            WrongInput: it is too long, or the template refuses it.
        """
        contents = [message["content"] for message in conversation.messages]
        if not self.chats:
            return BETWEEN.join(contents)
        if (length := sum(map(len, contents))) > LONGEST_CHAT:
            raise WrongInput(
                f"{conversation.where}: a conversation of {length:,} characters; divide it, {LONGEST_CHAT:,} are read"
            )
        clean = [LONE.sub("\ufffd", content) for content in contents]
        if not self.allowed:
            clean = [self._broken(content) for content in clean]
        messages = [
            {"role": LONE.sub("\ufffd", message["role"]), "content": content}
            for message, content in zip(conversation.messages, clean, strict=True)
        ]
        try:
            return self.tokenizer.apply_chat_template(
                messages,
                chat_template=DATE + self.tokenizer.get_chat_template(),
                return_dict=False,
                sanitize_control_tokens=not self.allowed,
                tokenizer_kwargs={"verbose": False},
            )
        except ImportError:
            raise
        except Exception as error:  # of a program in the model's folder
            raise WrongInput(
                f"{conversation.where}: the tokenizer's chat template does not take it ({first_line(error)}); "
                "change the row, or name fields of text with data.field"
            ) from None

    def start(self, how: WindowStart) -> list[int]:
        """Find the token ids that a window begins with: as a rule that of BOS, or none.

        Args:
            how: auto: what the tokenizer itself puts in front of a text when it is served; bos: the same, or BOS where
                it puts nothing; none: nothing.

        Raises:
            WrongInput: BOS was asked for and there is none.
        """
        if how == "none":
            return []
        bare, served = self._encode(ANY_TEXT), self._encode(ANY_TEXT, special=True)
        places = range(len(served) - len(bare) + 1)
        first = next((i for i in places if served[i : i + len(bare)] == bare), 0)
        if first or how == "auto":
            return served[:first]
        bos = getattr(self.tokenizer, "bos_token_id", None)
        if bos is None:
            raise WrongInput("data.window_start is bos, and the tokenizer has no BOS token; give auto or none")
        return [bos]

    def _encode(self, text: str, apart: bool = False, special: bool = False) -> list[int]:
        more = {"split_special_tokens": True} if apart else {}
        try:
            return self.tokenizer.encode(text, add_special_tokens=special, verbose=False, **more)
        except Exception as error:  # of a parser of files of somebody else's
            said = f"{type(error).__name__}: {first_line(error)}"
            raise WrongInput(f"the tokenizer cannot encode {text[:20]!r}: {said}; see to its files") from error

    def _broken(self, text: str) -> str:
        return self._produced.sub(lambda found: f"{found[0][0]} {found[0][1:]}", text)


def _any_of(words: Iterable[str]) -> re.Pattern[str]:
    longest_first = sorted(filter(None, words), key=lambda word: (-len(word), word))
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
