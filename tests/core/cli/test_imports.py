"""What needs no model loads nothing heavy, so that it answers at once."""

import json
import subprocess
import sys

import pytest

HEAVY = ("torch", "transformers", "numpy", "huggingface_hub", "optuna")
RUN = f"""
import json, sys
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from prunekit.cli.main import app
for arguments in sys.argv[1:]:
    with redirect_stdout(StringIO()), redirect_stderr(StringIO()) as errors:
        try:
            app(arguments.split())
        except SystemExit as ended:
            code = ended.code
    print(json.dumps([code, errors.getvalue(), [name for name in {HEAVY} if name in sys.modules]]))
"""
COMMANDS = [
    (0, "--help"),
    (0, "--version"),
    *(
        (0, f"{command} --help")
        for command in (
            "prune",
            "plan",
            "compare",
            "report",
            "tune",
            "learn-budgets",
            "evaluate",
            "list",
            "check",
            "new",
            "doctor",
            "completion",
            "demo",
        )
    ),
    (0, "completion bash"),
    (0, "list"),
    (0, "list --kind allocator"),
    (2, "prun"),
    (2, "--foo"),
    (2, "prune --foo"),
    (2, "prune m -o out --sparsity half"),
    (2, "prune m -o out --pruner obz"),
    (2, "prune m -o out --finisher lara"),
    (2, "prune m -o out --recipe nope"),
    (2, "prune m -o out --track tensorbord"),
    (2, "tune m -o out --set tracker.folder=runs"),
    (2, "prune m -o out --sparsity 2"),
    (2, "prune m -o out --structure 4:2"),
    (2, "prune m -o out --structure rows"),
    (2, "prune m -o out --device gpu"),
    (2, "prune m -o out --device cpu,gpu"),
    (2, "prune m -o out --memory much"),
    (2, "prune m -o out --target speed=0.5"),
    (2, "prune m -o out --set pruner=obz"),
    (2, "plan m --set memory=much"),
    (2, "tune m -o out --set device=gpu"),
    (2, "evaluate m --device gpu"),
    (2, "prune m"),
    (2, f"prune m -o {__file__}"),
    (2, f"prune {__file__} -o out"),
    (2, "plan ./gone"),
    (2, "tune ./gone -o out"),
    (2, "evaluate ./gone"),
    (2, "prune"),
    (2, "evaluate m --seqlen 1"),
    (2, "list obz"),
    (2, "check obz"),
    (2, "new obs --kind pruner"),
    (2, "new mine --kind prunr"),
    (2, "new Mine --kind pruner"),
]


@pytest.fixture(scope="module")
def ends() -> dict[str, tuple[int, str, list[str]]]:
    """(exit code, what it said on standard error, what had been loaded by then) of every command, in one process."""
    arguments = [arguments for _, arguments in COMMANDS]
    done = subprocess.run([sys.executable, "-c", RUN, *arguments], capture_output=True, text=True, check=True)
    return dict(zip(arguments, map(json.loads, done.stdout.splitlines()), strict=True))


@pytest.mark.parametrize(("code", "arguments"), COMMANDS)
def test_neither_torch_nor_transformers_is_loaded(
    code: int, arguments: str, ends: dict[str, tuple[int, str, list[str]]]
) -> None:
    ended, said, loaded = ends[arguments]
    assert ended == code, said
    assert (said.count("\n") == 1 and said.startswith("error: ")) if code else not said
    assert not loaded


def test_versions_and_extras_are_read_without_an_import() -> None:
    script = (
        "import sys\nfrom prunekit.run import doctor\n"
        "assert doctor._versions([])['torch'] and list(doctor._extras()) and not list(doctor._unmet())\n"
        f"print([name for name in {HEAVY} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_the_module_is_the_command_line() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "prunekit.cli", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("prunekit ")
