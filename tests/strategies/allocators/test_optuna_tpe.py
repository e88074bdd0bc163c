import pytest

from prunekit.testing import converse
from prunekit.testing.spaces import ZOO

pytest.importorskip("optuna")
from prunekit_strategies.allocators.optuna_tpe import OptunaTPE


def test_says_nothing_and_leaves_the_log_level_as_it_was(capfd: pytest.CaptureFixture[str]) -> None:
    import optuna

    before = optuna.logging.get_verbosity()
    converse(OptunaTPE(trials=10), ZOO["uneven"]())
    assert optuna.logging.get_verbosity() == before
    assert capfd.readouterr() == ("", "")
