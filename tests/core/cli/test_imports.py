"""What needs no model loads nothing heavy, so that it answers at once."""

import subprocess
import sys

import pytest

HEAVY = ("torch", "transformers", "numpy", "huggingface_hub", "optuna")
RUN = f"""
import sys
from prunekit.cli.main import app
try:
    app(sys.argv[1:])
except SystemExit as ended:
    code = ended.code
loaded = [name for name in {HEAVY} if name in sys.modules]
assert not loaded, loaded
sys.exit(code)
"""


@pytest.mark.parametrize(
    ("code", "arguments"),
    [
        (0, "--help"),
        (0, "--version"),
        *(
            (0, f"{command} --help")
            for command in ("prune", "plan", "tune", "learn-budgets", "evaluate", "list", "check", "demo")
        ),
        (0, "list"),
        (0, "list --kind allocator"),
        (2, "prun"),
        (2, "--foo"),
        (2, "prune --foo"),
        (2, "prune m -o out --sparsity half"),
        (2, "prune m -o out --pruner obz"),
        (2, "prune m -o out --finisher lara"),
        (2, "prune m -o out --recipe nope"),
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
    ],
)
def test_neither_torch_nor_transformers_is_loaded(code: int, arguments: str) -> None:
    done = subprocess.run([sys.executable, "-c", RUN, *arguments.split()], capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr
    assert (done.stderr.count("\n") == 1 and done.stderr.startswith("error: ")) if code else not done.stderr


def test_the_module_is_the_command_line() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "prunekit.cli", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("prunekit ")
