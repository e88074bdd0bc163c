"""Where a run works: beside its output, until all of it is there.

`DIR.partial` holds candidates, ledger and the half-written result; a rename makes it `DIR`. A killed
run leaves only `DIR.partial`, and the same command goes on from it.
"""

from __future__ import annotations

import fcntl
import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from prunekit.errors import WrongInput
from prunekit.store import write_json


@contextmanager
def workplace(
    output: Path | None, identity: Mapping[str, Any], *, resume: bool = True, overwrite: bool = False
) -> Iterator[Path]:
    """The folder to work in; temporary when there is no output. It is removed when the run has ended well.

    `identity` is what must agree for an unfinished run to be gone on with.

    Raises:
        WrongInput: the output exists, belongs to another run, or another process works on it.
    """
    if output is None:
        with tempfile.TemporaryDirectory(prefix="prunekit-") as folder:
            yield Path(folder)
        return
    check_output(output, overwrite=overwrite)
    place = output.with_name(output.name + ".partial")
    place.mkdir(parents=True, exist_ok=True)
    with (place / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise WrongInput(f"another process works on {output}; wait for it or choose another --output") from error
        _take(place, identity, resume=resume, overwrite=overwrite)
        yield place
    shutil.rmtree(place)


def check_output(output: Path, *, overwrite: bool) -> None:
    """Refuse an output that holds something, unless it is a result of ours that may be overwritten."""
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    if not overwrite:
        raise WrongInput(f"{output} exists and is not empty; choose another --output, or replace it with --overwrite")
    if not (output / "recipe.yaml").is_file():
        raise WrongInput(f"{output} holds no pruned model, so it is not overwritten; choose another --output")


def publish(folder: Path, output: Path) -> None:
    """Put a finished folder in the place of `output`, by rename."""
    if output.exists():
        shutil.rmtree(output)
    folder.replace(output)


def _take(place: Path, identity: Mapping[str, Any], *, resume: bool, overwrite: bool) -> None:
    card = place / "run.json"
    wanted = json.loads(json.dumps(identity))
    if card.exists():
        found = json.loads(card.read_text())
        if found == wanted and resume and not overwrite:
            return
        if not overwrite:
            differ = sorted(k for k in wanted.keys() | found.keys() if wanted.get(k) != found.get(k))
            what = f"({', '.join(differ)} differ)" if differ else "and --no-resume was asked"
            raise WrongInput(
                f"{place} holds an unfinished run {what}; go on with its own command, or discard it with --overwrite"
            )
    for old in place.iterdir():
        if old.name != ".lock":
            shutil.rmtree(old) if old.is_dir() else old.unlink()
    write_json(card, wanted)
