"""Shells complete commands, options and the names that options take."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from prunekit.cli.completion import SHELLS, VARIABLE, one_of, prepare, several_of
from prunekit.cli.main import app
from prunekit.plugins.registry import ALLOCATORS, KINDS, PRUNERS
from prunekit.recipe.presets import presets


@pytest.fixture
def complete(monkeypatch: pytest.MonkeyPatch) -> Any:
    """What the command line answers bash behind `prunekit ...`, of which the last word is being typed."""
    monkeypatch.setenv(VARIABLE, "complete_bash")
    prepare()

    def ask(line: str) -> list[str]:
        words = f"prunekit {line}".split(" ")
        env = {VARIABLE: "complete_bash", "COMP_WORDS": "\n".join(words), "COMP_CWORD": str(len(words) - 1)}
        return CliRunner().invoke(app, [], env=env, prog_name="prunekit").stdout.split()

    return ask


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("comp", {"compare", "completion"}),
        ("prune --spar", {"--sparsity"}),
        ("prune m --pruner magn", {"magnitude"}),
        ("prune m --recipe default", {"default", "default-recover"}),
        ("prune m --format hf,on", {"hf,onnx"}),
        ("prune m --structure 2", {"2:4"}),
        ("prune m --device c", {"cpu", "cuda"}),
        ("compare m --pruners obs,magn", {"obs,magnitude"}),
        ("compare m --recipes fa", {"fast"}),
        ("tune m --sampler nsga-iii", {"nsga-iii"}),
        ("check magn", {"magnitude"}),
        ("new mine --kind pru", {"pruner"}),
        ("list --kind rec", {"recipe"}),
        ("completion z", {"zsh"}),
        ("plan m --pruner magn", {"magnitude"}),
        ("prune m --output ", set()),  # bash completes files then
    ],
)
def test_what_is_typed_is_completed(complete: Any, line: str, found: set[str]) -> None:
    assert set(complete(line)) == found


def test_everything_there_is_comes_from_the_registry(complete: Any) -> None:
    assert set(complete("")) == set(get_command(app).commands)  # type: ignore[attr-defined]
    assert set(complete("prune m --pruner ")) == set(PRUNERS)
    assert set(complete("compare m --allocators ")) == set(ALLOCATORS)
    assert set(complete("prune --recipe ")) == set(presets())
    assert set(complete("new mine --kind ")) == {registry.kind for registry in KINDS}


def test_of_several_each_is_given_once() -> None:
    found = several_of(lambda: ["a", "ab", "b"])
    assert found("") == ["a", "ab", "b"]
    assert found("a") == ["a", "ab"]
    assert found("a,") == ["a,ab", "a,b"]
    assert found("b,a,") == ["b,a,ab"]
    assert one_of(lambda: ["b", "a", "a"])("") == ["a", "b"]


@pytest.mark.parametrize("shell", SHELLS)
def test_a_script_is_printed(shell: str) -> None:
    done = CliRunner().invoke(app, ["completion", shell])
    assert done.exit_code == 0
    assert f"{VARIABLE}=complete_{shell}" in done.stdout
    if (program := shutil.which(shell)) is not None:
        subprocess.run([program, "-n"], input=done.stdout, text=True, check=True)


def test_another_shell_is_refused_in_a_sentence() -> None:
    done = CliRunner().invoke(app, ["completion", "bsh"])
    assert (done.exit_code, done.stderr) == (
        2,
        "error: no script for shell 'bsh'; did you mean 'bash'? there are bash, fish, zsh\n",
    )


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")
def test_bash_completes_with_it(tmp_path: Path) -> None:
    program = tmp_path / "prunekit"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m prunekit.cli "$@"\n')
    program.chmod(0o755)
    script = CliRunner().invoke(app, ["completion", "bash"]).stdout
    script += (
        "\nCOMP_WORDS=(prunekit compare m --pruners obs,magn)\nCOMP_CWORD=4\n_prunekit_completion prunekit\n"
        'echo "${COMPREPLY[@]}"\n'
    )
    env = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", "-c", script], env=env, capture_output=True, text=True, check=True)
    assert done.stdout == "obs,magnitude\n"
