"""A server on this machine that speaks the OpenAI protocol and says what a test tells it to."""

import json
import random
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

KEY = "sk-test-0123456789abcdef"


class Server:
    """`script(prompt, n)` answers the n-th request: a text, (status, body, headers), or None to hang up."""

    def __init__(self):
        self.requests = []  # (path, headers, body)
        self.script = lambda prompt, n: "hello"
        self.over = threading.Event()  # releases those who sleep
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                server.requests.append((self.path, dict(self.headers), body))
                answer = server.script(body["messages"][-1]["content"], len(server.requests) - 1)
                if answer is None:
                    return
                status, body, *headers = answer if isinstance(answer, tuple) else (200, completion(answer))
                self.send_response(status)
                for header in (headers or [{}])[0].items():
                    self.send_header(*header)
                self.end_headers()
                self.wfile.write(body.encode())

            def do_GET(self):
                server.requests.append((self.path, dict(self.headers), None))
                self.send_error(404)

            def log_message(self, format, *args):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.thread = threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.01})
        self.thread.start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.http.server_port}/v1"

    @property
    def prompts(self):
        return [body["messages"][-1]["content"] for _, _, body in self.requests]

    def sleep(self):
        """Say nothing until the test is over."""
        self.over.wait(30)

    def close(self):
        self.over.set()
        self.http.shutdown()
        self.thread.join()
        self.http.server_close()


def completion(text):
    return json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]})


@pytest.fixture
def another_server():
    one = Server()
    yield one
    one.close()


@pytest.fixture
def server(monkeypatch):
    """A fresh server; its key is in the environment, and retries do not wait."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr("prunekit_strategies.chat.PAUSE", 0.0)
    one = Server()
    yield one
    one.close()


@pytest.fixture
def breeder():
    """A script that does every operator as asked, at random, but the same for the same request."""

    def script(prompt, n):
        rng = random.Random(n)
        (size,) = map(int, re.findall(r"a vector of (\d+)", prompt))
        ((low, high),) = re.findall(r"between ([\d.]+) and ([\d.]+)", prompt)
        (count,) = map(int, re.findall(r"(?:Propose|Choose|each of these) (\d+)", prompt))
        if "Choose" in prompt:
            ids = range(len(re.findall(r"^\d+: loss", prompt, re.MULTILINE)))
            return json.dumps({"pairs": [rng.sample(ids, 2) for _ in range(count)]})
        key = "population" if "Propose" in prompt else "children"
        vectors = [[round(rng.uniform(float(low), float(high)), 2) for _ in range(size)] for _ in range(count)]
        return f"Here you are:\n```json\n{json.dumps({key: vectors})}\n```"

    return script
