"""Files that anyone may have changed, through the command line: one sentence and exit code 2, or success.

Of damaged state also exit code 1. Never a traceback, never more than 10 seconds or 500 MB.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from prunekit.cli.main import app

SECONDS, KILOBYTES = 10, 500_000
FEW, MANY = 12, 500  # examples of each kind of file; there are four
RECIPE: dict[str, Any] = {
    "pruner": "magnitude",
    "allocator": "uniform",
    "objective": "expected-error",
    "data": {"dataset": "python-docs", "seqlen": 16}
    | dict.fromkeys(("calibration_tokens", "search_tokens", "evaluation_tokens"), 64),
    "verify": False,
    "device": "cpu",
}
FIXED = ("data", "model")  # of a recipe: what a run must find, so that most examples come far

numbers = st.one_of(
    st.integers(-2, 70),
    st.sampled_from([10**5, 10**9, 2**31, 2**63, -(2**63), 10**30]),
    st.floats(),
)
values = st.recursive(
    st.one_of(
        st.none(), st.booleans(), numbers, st.text(max_size=8), st.sampled_from(["obs", "groups", "2:4", "auto"])
    ),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=6), inner, max_size=3)),
    max_leaves=6,
)


@pytest.fixture(scope="module")
def model(saved_letters: Callable[..., Path]) -> Path:
    return saved_letters()


def fuzzed(test: Callable[..., None]) -> Callable[..., None]:
    """The test on a few examples, and on many where minutes are allowed."""
    quiet = {"deadline": None, "suppress_health_check": list(HealthCheck)}

    def few(**arguments: Any) -> None:
        settings(max_examples=FEW, **quiet)(test)(**arguments)

    return few


def checked(arguments: list[str], codes: tuple[int, ...] = (0, 2)) -> None:
    """Run a command; its end is one of these, in words, in time."""
    began, before = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    done = CliRunner().invoke(app, arguments)
    assert done.exception is None or isinstance(done.exception, SystemExit), repr(done.exception)
    assert done.exit_code in codes, done.output
    assert time.monotonic() - began < SECONDS
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < KILOBYTES
    if done.exit_code:
        last = done.stderr.strip().splitlines()[-1]
        assert last.startswith("error: ")


def pruned(model: Path, place: Path, *more: str) -> list[str]:
    (place / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    asked = ["--recipe", str(place / "recipe.yaml"), "--output", str(place / "out"), "--sparsity", "0.5", "--quiet"]
    return ["prune", str(model), *asked, *more]
