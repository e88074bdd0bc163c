"""A question to a fresh Python process without network, which knows nothing but a script and the files it reads.

This file is also what that process runs: `python -P fresh.py SCRIPT PROBE ANSWER ARGUMENTS...` calls the function
`answer` of the script. Of prunekit it imports nothing, so that a model can be loaded as its users without it do.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
MOST_SAID = 4000  # letters of what a process said before it failed


class Failed(Exception):
    """The fresh process ended without an answer; says what it said."""

    def __init__(self, said: str, code: int = 1) -> None:
        """`code`: that it ended with, below 0 the signal that ended it."""
        super().__init__(said)
        self.code = code


def python_of(variable: str) -> str:
    """The Python that an environment variable names, for engines that cannot be installed here; unset: this one.

    Raises:
        WrongInput: there is no such program.
    """
    from prunekit.errors import WrongInput  # here: the fresh process runs this file without prunekit

    named = os.environ.get(variable, "")
    if not named:
        return sys.executable
    found = shutil.which(str(Path(named).expanduser()))
    if found is None:
        raise WrongInput(
            f"{variable} is {named!r}, which is no program; it names a Python, such as /opt/env/bin/python"
        )
    return found


def ask_fresh(
    script: str | Path, asked: Mapping[str, Tensor], arguments: Sequence[object] = (), *, python: str | None = None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Call `answer(tensors, *arguments)` of a script in a fresh process.

    Args:
        script: a Python file, whose imports at its top are all that it needs of its package.
        asked: tensors that it is given.
        arguments: further ones; they arrive as text.
        python: that runs it, with torch and safetensors; None: this one.

    Returns:
        What the function returns: (JSON values, tensors).

    Raises:
        Failed: it did not come to an end.
    """
    from safetensors.torch import load_file, save_file

    from prunekit.system.ending import tidy_ending  # here: the fresh process runs this file without prunekit

    with tidy_ending(), tempfile.TemporaryDirectory(prefix="prunekit-verify-") as scratch, _held_pipe() as pipe:
        probe, found = Path(scratch, "probe.safetensors"), Path(scratch, "found.safetensors")
        save_file(
            {name: tensor.detach().cpu().contiguous().clone() for name, tensor in asked.items()}, probe
        )  # views share memory
        # -P: the folder of this file is no place to import from; modules of remote code go to the scratch folder
        command = [python or sys.executable, "-P", __file__, str(Path(script).resolve()), str(probe), str(found)]
        child = subprocess.run(
            [*command, *map(str, arguments)],
            env=os.environ | OFFLINE | {"HF_MODULES_CACHE": str(Path(scratch, "modules"))},
            cwd=scratch,
            stdin=pipe,
            capture_output=True,
            text=True,
            check=False,
        )
        if child.returncode:
            raise Failed(child.stderr[-MOST_SAID:].strip(), child.returncode)
        return json.loads(child.stdout.splitlines()[-1]), load_file(found) if found.exists() else {}


@contextmanager
def _held_pipe() -> Iterator[int]:
    """A pipe to read from that ends when this process does, however it does."""
    read, write = os.pipe()
    try:
        yield read
    finally:
        os.close(read)
        os.close(write)


def _end_with_parent(scratch: Path) -> None:
    """Wait until the process that asked is gone; then nobody wants the answer, nor tidies up."""
    os.read(sys.stdin.fileno(), 1)  # nothing is ever written; a buffer would be locked when this process ends
    shutil.rmtree(scratch, ignore_errors=True)
    os._exit(1)


def _run(script: str, probe: str, found: str, *arguments: str) -> None:
    """Answer, in the fresh process."""
    threading.Thread(target=_end_with_parent, args=[Path(probe).parent], daemon=True).start()
    spec = importlib.util.spec_from_file_location("asked_script", script)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules["asked_script"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    from safetensors.torch import load_file, save_file

    told, tensors = module.answer(load_file(probe), *arguments)
    if tensors:
        save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, found)
    print(json.dumps(told))


if __name__ == "__main__":
    _run(*sys.argv[1:])
