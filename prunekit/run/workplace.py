"""Where a run works: beside its output, until all of it is there.

`DIR.partial` holds candidates, ledger and the half-written result; a rename makes it `DIR`. A killed
run leaves only `DIR.partial`, and the same command goes on from it.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from prunekit.errors import WrongInput
from prunekit.system.files import write_json

LOCK = ".lock"  # in a folder that one process at a time may use


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
    with claimed(
        _beside(output, "partial"), identity, "an unfinished run", resume=resume, overwrite=overwrite
    ) as place:
        yield place
        shutil.rmtree(place, ignore_errors=True)  # Windows keeps the lock, which is open


@contextmanager
def claimed(
    place: Path, identity: Mapping[str, Any], what: str, *, resume: bool = True, overwrite: bool = False
) -> Iterator[Path]:
    """A folder for this process alone, with what an earlier one of the same identity has left there.

    Raises:
        WrongInput: it holds something else, or another process works on it.
    """
    place.mkdir(parents=True, exist_ok=True)
    lock = FileLock(place / LOCK, blocking=False)  # the system gives it back when a process is killed
    try:
        lock.acquire()
    except Timeout as error:
        raise WrongInput(f"another process works on {place}; wait for it or choose another --output") from error
    try:
        _take(place, identity, what, resume=resume, overwrite=overwrite)
        yield place
    finally:
        lock.release()


def check_output(output: Path, *, overwrite: bool, sources: Iterable[str | Path] = ()) -> None:
    """Refuse, before any work, an output that cannot be made or must not be replaced.

    Only a result of prunekit is ever replaced, and never one that holds a source of this run.

    Raises:
        WrongInput: says what is in the way.
    """
    place = output.resolve()
    if place.is_mount():
        raise WrongInput(f"{output} is a mount point and cannot be renamed into; choose a folder inside it")
    for path in (place, _beside(place, "partial")):
        if path.exists() and not path.is_dir():
            raise WrongInput(f"{path} is a file; choose another --output")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise WrongInput(f"{output} cannot be made: {error.strerror}: {error.filename}") from error
    if not os.access(place.parent, os.W_OK | os.X_OK):
        raise WrongInput(f"{output} cannot be made: {place.parent} cannot be written to")
    if not place.exists() or not any(place.iterdir()):
        return
    if not overwrite:
        raise WrongInput(f"{output} exists and is not empty; choose another --output, or replace it with --overwrite")
    if not _is_result(place):
        raise WrongInput(f"{output} is no result of prunekit, so it is not overwritten; choose another --output")
    for source in (Path.cwd(), *sources):
        if Path(source).expanduser().resolve().is_relative_to(place):
            raise WrongInput(f"{output} holds {source}, which this run needs; choose another --output")


def unfinished(output: Path) -> bool:
    """Whether a run towards `output` was begun and not ended."""
    return (_beside(output, "partial") / "run.json").exists()


def written(output: Path) -> int:
    """Bytes that an unfinished run towards `output` has on disk."""
    return sum(file.stat().st_size for file in _beside(output, "partial").rglob("*") if file.is_file())


def left(output: Path, identity: Mapping[str, Any]) -> Path | None:
    """The folder of an unfinished run of the same identity; None: there is none."""
    place = _beside(output, "partial")
    try:
        found = json.loads((place / "run.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return place if found == json.loads(json.dumps(identity)) else None


def publish(folder: Path, output: Path) -> None:
    """Put a finished folder in the place of `output`, by rename; what was there goes when that is done.

    At every moment the old result or the new one is there whole: in the place of `output`, or, between two renames,
    beside it as `.NAME.replaced`, from where it comes back when the second one fails.
    """
    output = output.resolve()
    old = output.with_name(f".{output.name}.replaced")
    if replaced := output.exists():
        shutil.rmtree(old, ignore_errors=True)  # left by a process that was killed at the end of this function
        output.replace(old)
    try:
        folder.replace(output)
    except BaseException:
        if replaced:
            old.replace(output)
        raise
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def new_folder(output: Path) -> Iterator[Path]:
    """A folder of its own beside `output`, to be filled and then published; gone when that fails."""
    place = output.resolve()
    with tempfile.TemporaryDirectory(prefix=f".{place.name}.", dir=place.parent) as made:
        folder = Path(made) / "result"
        folder.mkdir()
        yield folder
        publish(folder, output)


def _beside(output: Path, suffix: str) -> Path:
    place = output.resolve()
    return place.with_name(f"{place.name}.{suffix}")


def _is_result(folder: Path) -> bool:
    file = next((file for name in ("report.json", "pareto.json") if (file := folder / name).exists()), None)
    try:
        return file is not None and "schema" in json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False


def _take(place: Path, identity: Mapping[str, Any], held: str, *, resume: bool, overwrite: bool) -> None:
    card, wanted = place / "run.json", json.loads(json.dumps(identity))
    left = [path for path in place.iterdir() if path.name != LOCK]
    if left and not card.exists():
        raise WrongInput(f"{place} is where this run would work, but holds other files; choose another --output")
    if card.exists():
        found = json.loads(card.read_text(encoding="utf-8"))
        differ = sorted(k for k in wanted.keys() | found.keys() if wanted.get(k) != found.get(k))
        if not differ and resume:
            return
        if not overwrite:
            what = f"(another {', '.join(differ)})" if differ else "and --no-resume was asked"
            raise WrongInput(f"{place} holds {held} {what}; go on with its own command, or discard it with --overwrite")
    for old in left:
        shutil.rmtree(old) if old.is_dir() else old.unlink()
    write_json(card, wanted)
