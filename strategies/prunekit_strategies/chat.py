"""Language models that answer a prompt: behind an OpenAI-compatible endpoint, or on this machine.

The endpoint is asked by the standard library, not by `huggingface_hub.InferenceClient`: that one sends the user's
Hugging Face token to any server for which no key is given, neither asks again nor waits for Retry-After, and reads
replies of any length.
"""

from __future__ import annotations

import http.client
import json
import math
import os
import time
from base64 import b64encode
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from functools import cached_property, partial
from threading import Thread
from typing import Any, Protocol, TypeVar
from urllib.error import HTTPError
from urllib.parse import quote, urlsplit
from urllib.request import Request, urlopen

from prunekit import WrongInput

PING = 'Answer with the JSON object {"ready": true} and nothing else.'
PAUSE = 1.0  # seconds before a request is repeated, doubled every time
LATER = (408, 409, 425, 429, 500, 502, 503, 504)  # status codes of what may work the next time
MOST_BYTES = 2**24  # of an answer
T = TypeVar("T")
FEW_LETTERS = 8  # a key shorter than this is no secret but a placeholder


class Unanswered(Exception):
    """No reply came; says why in one sentence without the key."""


class Chat(Protocol):
    """A language model."""

    def ready(self) -> None:
        """Raise WrongInput where it cannot be reached or opened."""

    def complete(self, prompt: str, seed: int) -> str:
        """Its reply to one prompt, without memory of earlier ones.

        Raises:
            Unanswered: there is none this time.
            WrongInput: there can be none before the user has changed something.
        """
        ...


@dataclass(frozen=True)
class Endpoint:
    """A server that speaks the OpenAI protocol, /chat/completions. The key is read when needed and never kept."""

    base_url: str  # up to and without /chat/completions
    model: str
    key_variable: str | None  # environment variable that holds the key; None: the server wants none
    temperature: float
    timeout: float  # seconds until a reply is there whole
    retries: int

    def ready(self) -> None:
        try:
            self.complete(PING, 0)
        except Unanswered as error:
            raise WrongInput(str(error)) from None

    def complete(self, prompt: str, seed: int) -> str:
        key = self._key()
        messages = [{"role": "user", "content": prompt}]
        body = {"model": self.model, "messages": messages, "temperature": self.temperature}  # no seed: few know one
        request = Request(
            f"{self.base_url.rstrip('/')}/chat/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        if key:
            request.add_unredirected_header("Authorization", f"Bearer {key}")  # for this host only
        why = ""
        for attempt in range(self.retries + 1):
            wait = PAUSE * 2**attempt
            try:
                body, refused = _within(self.timeout, partial(_fetched, request, self.timeout))
                if refused is None:
                    return _hidden(_content(body), key)
                why = f"HTTP {refused.code} {' '.join(refused.reason.split())[:200]}{_said(body, key)}"
                wait = _asked_wait(refused.headers.get("Retry-After"), wait, self.timeout)
                if refused.code not in LATER:
                    break
            except (OSError, http.client.HTTPException) as error:
                why = str(getattr(error, "reason", error)) or type(error).__name__
            except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
                why = "what it says is no chat completion"
                break
            if attempt < self.retries:
                time.sleep(wait)
        raise Unanswered(_hidden(f"{self.model!r} at {self.base_url} gave no answer: {why}", key))

    def _key(self) -> str:
        if self.key_variable is None:
            return ""
        key = os.environ.get(self.key_variable, "").strip()
        if not key:
            raise WrongInput(
                f"the environment variable {self.key_variable}, which is to hold the key for {self.base_url}, is not "
                "set; set it, or name another with key_variable, null where no key is needed"
            )
        if not (key.isascii() and key.isprintable()):
            raise WrongInput(f"what the environment variable {self.key_variable} holds is no key that can be sent")
        return key


@dataclass(frozen=True)
class LocalModel:
    """A causal language model of transformers, beside the one that is pruned; loaded at the first prompt."""

    model: str  # folder or hub id
    temperature: float  # 0: greedy
    reply_tokens: int  # at most

    def ready(self) -> None:
        from prunekit.models.intake import read_config
        from prunekit.models.opening import load_tokenizer

        read_config(self.model)
        load_tokenizer(self.model)

    def complete(self, prompt: str, seed: int) -> str:
        import torch
        from transformers import GenerationConfig

        model, tokenizer = self._loaded
        if tokenizer.chat_template:
            turns = [{"role": "user", "content": prompt}]
            told = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
            ids = tokenizer(told, add_special_tokens=False, return_tensors="pt")["input_ids"].to(model.device)
        else:
            ids = tokenizer(prompt, return_tensors="pt")["input_ids"].to(model.device)
        room = getattr(model.config, "max_position_embeddings", 2**20) - ids.shape[1]
        if room < 1:
            raise Unanswered(f"{self.model!r} has no room for a prompt of {ids.shape[1]:,} tokens")
        end = model.generation_config.eos_token_id
        sampling = {"do_sample": True, "temperature": self.temperature, "top_k": 0} if self.temperature > 0 else {}
        config = GenerationConfig(
            max_new_tokens=min(room, self.reply_tokens),
            eos_token_id=end,
            pad_token_id=end[0] if isinstance(end, list) else end,
            **sampling,
        )
        # the generator of sampling is the global one: borrowed, and given back as it was
        with torch.no_grad(), torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            torch.manual_seed(seed)
            try:
                out = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
            except RuntimeError as error:  # out of memory, or probabilities that are not finite
                raise Unanswered(f"{self.model!r} gave no answer: {str(error).splitlines()[0]}") from error
        return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)

    @cached_property
    def _loaded(self) -> tuple[Any, Any]:
        from prunekit.measure.evaluate import load
        from prunekit.models.opening import load_tokenizer

        return load(self.model).eval(), load_tokenizer(self.model)


def check_address(base_url: str) -> None:
    """Refuse what is no address of a server, and what would put a secret into a recipe.

    Raises:
        ValueError: says which, without repeating a secret.
    """
    parts = urlsplit(base_url)
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise ValueError("base_url is written down with the result: no password, no ?query in it; keys go by variable")
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"base_url is like https://api.openai.com/v1, not {base_url!r}")


def _fetched(request: Request, timeout: float) -> tuple[bytes, HTTPError | None]:
    """(the reply, how it was refused)."""
    try:
        with urlopen(request, timeout=timeout) as response:
            return response.read(MOST_BYTES), None
    except HTTPError as error:
        with error:
            return error.read(MOST_BYTES), error


def _within(seconds: float, call: Callable[[], T]) -> T:
    """What a call returns, if it does in time: a server that sends byte by byte is never silent, and never done.

    Raises:
        TimeoutError: it does not. Its thread ends with the connection, or with the process.
    """
    found = Future[T]()

    def run() -> None:
        try:
            found.set_result(call())
        except BaseException as error:
            found.set_exception(error)

    Thread(target=run, daemon=True).start()
    try:
        return found.result(seconds)
    except TimeoutError:
        raise TimeoutError(f"timed out: no whole reply in {seconds:g} s") from None


def _hidden(text: str, key: str) -> str:
    """Servers may repeat what they were sent, in part or in another spelling; a record must not."""
    if len(key) < FEW_LETTERS:
        return text
    pieces = {word[i : i + FEW_LETTERS].lower() for word in _spellings(key) for i in range(len(word) - FEW_LETTERS + 1)}
    found = [i for i in range(len(text)) if text[i : i + FEW_LETTERS].lower() in pieces]
    said, end = "", 0
    for i in found:
        if i > end or not said:
            said += f"{text[end:i]}[key]"
        end = i + FEW_LETTERS
    return said + text[end:]


def _spellings(key: str) -> set[str]:
    """A key as it may come back: as it is, backwards, quoted for URLs or JSON, in hex, in base64 at any place."""
    raw = key.encode()
    base64 = {b64encode(b"\0" * shift + raw).decode()[-(-shift * 8 // 6) :].rstrip("=")[:-1] for shift in range(3)}
    url_safe = {word.replace("+", "-").replace("/", "_") for word in base64}
    return {key, key[::-1], quote(key, safe=""), json.dumps(key)[1:-1], raw.hex(), *base64, *url_safe}


def _content(body: bytes) -> str:
    """The text of a chat completion; empty where the model said nothing."""
    return str(json.loads(body)["choices"][0]["message"].get("content") or "")


def _said(body: bytes, key: str) -> str:
    """The server's own explanation, on one line."""
    try:
        message = json.loads(body)["error"]["message"]
    except (ValueError, LookupError, TypeError, RecursionError):
        return ""
    return f": {' '.join(_hidden(str(message), key).split())[:200]}"  # hidden first: half a key is one too many


def _asked_wait(header: str | None, wait: float, most: float) -> float:
    """Seconds the server asks us to wait, within reason."""
    try:
        asked = float(header or wait)
    except ValueError:  # a date
        return wait
    return wait if math.isnan(asked) else min(max(asked, 0.0), most)
