"""Language models that answer, and all the ways in which they do not."""

import json
import random
import socket
import threading
import time
from base64 import b64encode, urlsafe_b64encode
from urllib.parse import quote

import pytest
import torch
from transformers import AutoTokenizer

from prunekit import WrongInput
from prunekit_strategies.chat import Endpoint, LocalModel, Unanswered, _hidden, check_address

KEY = "sk-test-0123456789abcdef"


def endpoint(url, retries=0, timeout=5.0, variable: str | None = "OPENAI_API_KEY"):
    return Endpoint(url, "some-model", variable, 0.7, timeout, retries)


def test_the_prompt_goes_to_chat_completions_and_the_reply_comes_back(server):
    assert endpoint(server.url + "/").complete("What is α?", 1) == "hello"
    ((path, headers, body),) = server.requests
    assert path == "/v1/chat/completions"
    assert headers["Authorization"] == f"Bearer {KEY}"
    assert body == {
        "model": "some-model",
        "messages": [{"role": "user", "content": "What is α?"}],
        "temperature": 0.7,
    }


def test_a_server_without_a_key_is_sent_none(server):
    endpoint(server.url, variable=None).ready()
    assert "Authorization" not in server.requests[0][1]


def test_a_model_that_says_nothing_says_an_empty_text(server):
    server.script = lambda *_: (200, json.dumps({"choices": [{"message": {"content": None}}]}))
    assert endpoint(server.url).complete("?", 0) == ""


@pytest.mark.parametrize("status", [429, 500, 503])
def test_what_may_pass_is_asked_again(server, status):
    server.script = lambda _, n: "at last" if n == 2 else (status, "busy")
    assert endpoint(server.url, retries=2).complete("?", 0) == "at last"
    server.script = lambda *_: (status, "busy")
    with pytest.raises(Unanswered, match=f"HTTP {status}"):
        endpoint(server.url, retries=1).complete("?", 0)
    assert len(server.requests) == 3 + 2


@pytest.mark.parametrize("status", [400, 401, 404])
def test_what_will_not_pass_is_not(server, status):
    server.script = lambda *_: (status, json.dumps({"error": {"message": "no such\nmodel"}}))
    with pytest.raises(Unanswered, match=f"some-model.*HTTP {status} .*: no such model$"):
        endpoint(server.url, retries=2).complete("?", 0)
    assert len(server.requests) == 1


@pytest.mark.parametrize("body", ["<html>", "{}", "[]", '{"choices": []}', '{"choices": [{"message": "hi"}]}', ""])
def test_what_is_no_completion_is_no_answer(server, body):
    server.script = lambda *_: (200, body)
    with pytest.raises(Unanswered, match="no chat completion"):
        endpoint(server.url).complete("?", 0)


def test_a_reply_nested_without_end_is_no_completion(server):
    server.script = lambda *_: (200, "[" * 100_000)
    with pytest.raises(Unanswered, match="no chat completion"):
        endpoint(server.url).complete("?", 0)
    server.script = lambda *_: (400, "[" * 100_000)
    with pytest.raises(Unanswered, match="HTTP 400"):
        endpoint(server.url).complete("?", 0)


@pytest.mark.parametrize("asked", ["nan", "-nan", "inf", "-5", "1e999", "soon"])
def test_a_wait_that_is_no_number_is_ours(server, asked):
    server.script = lambda _, n: "at last" if n else (429, "busy", {"Retry-After": asked})
    assert endpoint(server.url, retries=1, timeout=1.0).complete("?", 0) == "at last"


def test_a_server_that_sends_byte_by_byte_is_given_up(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    listening, over = socket.create_server(("127.0.0.1", 0)), threading.Event()

    def drip():
        connection, _ = listening.accept()
        with connection:
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
            while not over.wait(0.05):
                connection.sendall(b" ")

    thread = threading.Thread(target=drip)
    thread.start()
    try:
        began = time.monotonic()
        with pytest.raises(Unanswered, match=r"no whole reply in 0\.3 s"):
            endpoint(f"http://127.0.0.1:{listening.getsockname()[1]}/v1", timeout=0.3).complete("?", 0)
        assert time.monotonic() - began < 5
    finally:
        over.set()
        thread.join()
        listening.close()


def test_who_hangs_up_or_sleeps_gives_no_answer(server):
    server.script = lambda *_: None
    with pytest.raises(Unanswered, match="gave no answer"):
        endpoint(server.url).complete("?", 0)
    server.script = lambda *_: server.sleep()
    with pytest.raises(Unanswered, match="timed out"):
        endpoint(server.url, timeout=0.1).complete("?", 0)


def test_nobody_there_is_one_sentence():
    with socket.socket() as taken:  # bound and not listening
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/v1"
        with pytest.raises(WrongInput, match=f"at {url} gave no answer: .*refused"):
            endpoint(url, variable=None).ready()


@pytest.mark.parametrize("held", [None, "", "  ", "two\nlines", "schlüssel"])
def test_a_key_that_is_missing_or_broken_is_the_users_to_mend(server, monkeypatch, held):
    if held is None:
        monkeypatch.delenv("OPENAI_API_KEY")
    else:
        monkeypatch.setenv("OPENAI_API_KEY", held)
    with pytest.raises(WrongInput, match="environment variable OPENAI_API_KEY") as refused:
        endpoint(server.url).complete("?", 0)
    assert not held or not held.strip() or held not in str(refused.value)
    assert not server.requests


def test_a_server_that_repeats_the_key_is_not_repeated(server):
    server.script = lambda *_: f"your key is {KEY}"
    assert endpoint(server.url).complete("?", 0) == "your key is [key]"
    for padding in range(170, 205):  # wherever the sentence is cut
        server.script = lambda *_, n=padding: (401, json.dumps({"error": {"message": "x" * n + KEY}}))
        with pytest.raises(Unanswered) as refused:
            endpoint(server.url).complete("?", 0)
        assert "sk-" not in str(refused.value)


def test_the_key_does_not_follow_a_redirect(server, another_server):
    server.script = lambda *_: (302, "", {"Location": another_server.url})
    with pytest.raises(Unanswered, match="HTTP 404"):
        endpoint(server.url).complete("?", 0)
    ((_, headers, _),) = another_server.requests
    assert KEY not in str(headers)


def test_a_server_is_waited_for_as_long_as_it_asks_but_not_for_ever(server, monkeypatch):
    waits = []
    monkeypatch.setattr("time.sleep", waits.append)
    asked = iter(["3", "999", "tomorrow"])
    server.script = lambda *_: (429, "", {"Retry-After": next(asked, "0")})
    with pytest.raises(Unanswered, match="HTTP 429"):
        endpoint(server.url, retries=3, timeout=60.0).complete("?", 0)
    assert waits == [3.0, 60.0, 0.0]


@pytest.mark.parametrize(
    "url", ["localhost:8000", "file:///etc/passwd", "ftp://host/v1", "http://", "https://me:secret@host/v1", "http://h?key=secret"]
)  # fmt: skip
def test_an_address_is_one_and_holds_no_secret(url):
    with pytest.raises(ValueError, match="base_url") as refused:
        check_address(url)
    assert "secret" not in str(refused.value)


# -- on this machine ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(saved_tiny):
    """With room for a prompt."""
    return saved_tiny(max_position_embeddings=4096)


def test_a_local_model_says_the_same_for_the_same_seed(folder):
    chat = LocalModel(str(folder), 1.0, 12)
    chat.ready()
    assert chat.complete("def f(x):", 3) == chat.complete("def f(x):", 3)
    assert chat.complete("def f(x):", 3) != chat.complete("def f(x):", 4)
    greedy = LocalModel(str(folder), 0.0, 12)
    assert greedy.complete("def f(x):", 3) == greedy.complete("def f(x):", 4)


def test_it_leaves_the_global_random_state_alone(folder):
    before = torch.get_rng_state(), random.getstate()
    LocalModel(str(folder), 1.0, 4).complete("x", 3)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]


def test_it_is_spoken_to_in_its_own_template(folder, saved_tiny):
    other = saved_tiny(max_position_embeddings=4096)
    tokenizer = AutoTokenizer.from_pretrained(other)
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"
    tokenizer.save_pretrained(other)
    plain, templated = LocalModel(str(folder), 0.0, 12), LocalModel(str(other), 0.0, 12)
    assert templated.complete("hi", 0) == plain.complete("<user>hi<assistant>", 0) != plain.complete("hi", 0)


def test_a_prompt_without_room_for_a_reply_is_not_answered(folder):
    with pytest.raises(Unanswered, match="no room for a prompt of"):
        LocalModel(str(folder), 0.0, 12).complete("a b " * 4096, 0)


def test_what_cannot_be_opened_is_one_sentence(tmp_path):
    (tmp_path / "empty").mkdir()
    for place, sentence in {"empty": "not a model that can be opened", "nowhere": "no model folder"}.items():
        with pytest.raises(WrongInput, match=sentence):
            LocalModel(str(tmp_path / place), 0.0, 12).ready()


WHOLE = "sk-proj-AbC/12+3456789xyz"


@pytest.mark.parametrize(
    "said",
    [
        WHOLE,
        WHOLE.upper(),
        WHOLE[::-1],
        WHOLE[:10],
        WHOLE[-9:],
        f"{WHOLE}{WHOLE}",
        WHOLE.encode().hex(),
        quote(WHOLE, safe=""),
        b64encode(WHOLE.encode()).decode(),
        b64encode(f"user:{WHOLE}".encode()).decode(),
        urlsafe_b64encode(f"Bearer {WHOLE}".encode()).decode(),
    ],
)
def test_a_key_is_hidden_in_part_and_in_other_spellings(said: str) -> None:
    hidden = _hidden(f"your key is {said}, is it not?", WHOLE)
    assert hidden.count("[key]") == 1
    middle = len(said) // 2  # base64 begins and ends with what is not the key
    assert said[middle : middle + 8] not in hidden
    assert hidden.startswith("your key is ")
    assert hidden.endswith(", is it not?")


def test_other_words_and_placeholders_are_not_hidden() -> None:
    assert _hidden("a plain answer", WHOLE) == "a plain answer"
    assert _hidden("EMPTY is empty", "EMPTY") == "EMPTY is empty"
