"""What the default recipe promises: its pruner aims at the residual stream, and that pays."""

from typing import Any

import pytest

import prunekit
from prunekit.demo import MODEL

FEW: dict[str, Any] = {
    "allocator": "uniform",  # both with the same sizes
    "objective": "expected-error",
    "rebuild": False,
    "data__dataset": "python-docs",
    "data__calibration_tokens": 8192,
    "data__search_tokens": 128,
    "data__evaluation_tokens": 4096,
    "data__seqlen": 128,
    "verify": False,
    "quiet": True,
}


@pytest.mark.slow
def test_the_default_aims_at_the_residual_stream_and_loses_less_than_without() -> None:
    assert prunekit.resolve(prunekit.Recipe.load()).recipe.pruner["aim"] == "stream"

    def rise(**changes: Any) -> float:
        return prunekit.prune(MODEL, **FEW, **changes).report["losses"]["rise"]["nll"]  # nats per token

    assert 0 < rise() < 0.9 * rise(pruner__aim="own")  # 0.85 of it
