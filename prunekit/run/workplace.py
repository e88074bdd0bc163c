"""Where a run works: beside its output, until all of it is there.

`DIR.partial` holds candidates, ledger and the half-written result; a rename makes it `DIR`. A killed
run leaves only `DIR.partial`, and the same command goes on from it. A folder of ours is known by the lock in it,
which is made first; its card, `run.json`, says whose it is, and goes last.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from prunekit.errors import WrongInput
from prunekit.report.origin import is_legal
from prunekit.system.files import (
    MODEL_FILES,
    SEAL,
    Damaged,
    check_name,
    clear,
    digest,
    files_in,
    others,
    read_state,
    seal,
    sealed,
    settle_folder,
    temporary_of,
    write_state,
)

LOCK = ".prunekit.lock"  # in a folder that one process at a time may use
CARD = "run.json"
_MADE = re.compile(  # whatever runs and studies write below the folder that they work in
    # a model of a comparison, one of several workers, a member of a family, a share of the width
    r"model-\d+/worker-\d+/worker\.log|(model-\d+/)?(worker-\d+/)?(\d[\d.e-]*/)?(share-\d[\d.e-]*/)?("
    r"(walks/)?(walk|gradients|fisher|stream)-[\w-]+/.*\.(safetensors|json)"
    r"|(teacher|activations|learner|finisher-\d+)/.*\.(safetensors|json)"
    r"|replaced/.*|\.?(run|prices|priced|base|trials)\.json|ledger\.jsonl|\.prunekit\.lock"
    r"|rows\.(jsonl|parquet)|summary\.json|leaderboard\.md"
    r"|trial-\w+/.*\.(safetensors|jsonl?)|study\.log.*|(best|pareto-\d+)\.yaml)",
    re.DOTALL,
)

_RESULT = re.compile(  # half-written ones
    r"(\d[\d.e-]*/)?(result|written)/((\d[\d.e-]*|budgets)/)?(?P<name>.*)", re.DOTALL
)
_RESULT_FILES = (
    *MODEL_FILES,
    "recipe.yaml",
    "ledger.jsonl",
    "report.json",
    "report.html",
    "README.md",
    "*.svg",
    "permissions",
)
_RESULT_FILES += (
    "prices.json",
    "pareto.json",
    "searches.json",
    "learnt.safetensors",
    "learnt.json",
    "judged/*",
    "exports.json",
    SEAL,
)


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
        _clear(place)
        (place / CARD).unlink(missing_ok=True)  # last: as long as there is anything else, it says whose that is
        with suppress(OSError):  # Windows keeps what is open
            (place / LOCK).unlink()
            place.rmdir()


@contextmanager
def claimed(
    place: Path,
    identity: Mapping[str, Any],
    what: str,
    *,
    resume: bool = True,
    overwrite: bool = False,
    stays: Path | None = None,
) -> Iterator[Path]:
    """A folder for this process alone, with what an earlier one of the same identity has left there.

    `stays` is a database that may lie in it, and is not removed.

    Raises:
        WrongInput: it holds something else, or another process works on it.
    """
    if place.is_dir() and any(place.iterdir()) and not (place / LOCK).exists():
        raise WrongInput(
            f"{place} is where this run would work, but holds other files; move them, or choose another --output"
        )
    place.mkdir(parents=True, exist_ok=True)
    lock = FileLock(place / LOCK, blocking=False)  # the system gives it back when a process is killed
    try:
        lock.acquire()
    except Timeout as error:
        raise WrongInput(f"another process works on {place}; wait for it or choose another --output") from error
    try:
        _take(place, identity, what, resume=resume, overwrite=overwrite, stays=stays)
        yield place
    finally:
        lock.release()


def check_output(output: Path, *, overwrite: bool, sources: Iterable[str | Path] = ()) -> None:
    """Refuse, before any work, an output that cannot be made or must not be replaced.

    Only a result of prunekit is ever replaced, and never one that holds a source of this run.

    Raises:
        WrongInput: says what is in the way.
    """
    check_name(output)
    try:
        place = output.resolve()
        partial = _beside(place, "partial")
        kinds = {path: path.is_dir() for path in (place, partial) if path.exists()}
    except (OSError, RuntimeError) as error:  # a link that leads to itself, a name too long
        raise WrongInput(f"{output} cannot be made: {getattr(error, 'strerror', None) or error}") from error
    if place.is_mount():
        raise WrongInput(f"{output} is a mount point and cannot be renamed into; choose a folder inside it")
    for path, is_folder in kinds.items():
        if not is_folder:
            raise WrongInput(f"{path} is a file; choose another --output")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise WrongInput(f"{output} cannot be made: {error.strerror}: {error.filename}") from error
    if not os.access(place.parent, os.W_OK | os.X_OK):
        raise WrongInput(f"{output} cannot be made: {place.parent} cannot be written to")
    if not place.exists() or not any(place.iterdir()) or published(partial, place):
        return
    if not overwrite:
        raise WrongInput(f"{output} exists and is not empty; choose another --output, or replace it with --overwrite")
    if not _is_result(place):
        raise WrongInput(f"{output} is no result of prunekit, so it is not overwritten; choose another --output")
    if mine := others(place):
        raise WrongInput(f"{output} holds {mine[0]}, which prunekit has not made; move it, or choose another --output")
    for source in (Path.cwd(), *sources):
        if Path(source).expanduser().resolve().is_relative_to(place):
            raise WrongInput(f"{output} holds {source}, which this run needs; choose another --output")


def unfinished(output: Path) -> bool:
    """Whether a run towards `output` was begun and not ended."""
    return (_beside(output, "partial") / CARD).exists()


def begun(output: Path) -> dict[str, Any] | None:
    """The identity of an unfinished run towards `output`, or of a study in it; None: there is none that says it."""
    card = _card(_beside(output, "partial")) or _card(output)
    return None if card is None else card["identity"]


def written(output: Path) -> int:
    """Bytes that an unfinished run towards `output` has on disk."""
    return sum(file.stat().st_size for file in _beside(output, "partial").rglob("*") if file.is_file())


def left(output: Path, identity: Mapping[str, Any]) -> Path | None:
    """The folder of an unfinished run of the same identity; None: there is none."""
    place = _beside(output, "partial")
    card = _card(place)
    return place if card is not None and card["identity"] == _plain(identity) else None


def published(place: Path, output: Path) -> bool:
    """Whether the run that works in `place` has put its result in the place of `output`, and was stopped after it."""
    card = _card(place)
    return (
        card is not None
        and card.get("published") is not None
        and (output / SEAL).is_file()
        and digest(output / SEAL) == card["published"]
    )


def publish(folder: Path, output: Path, *, overwrite: bool = True) -> None:
    """Put a finished folder in the place of `output`, by rename, when all of it is on disk.

    At every moment the old result or the new one is there whole: in the place of `output`, or, between two renames,
    as `replaced` beside the new one, from where it comes back when the second rename fails.

    Raises:
        WrongInput: as of `check_output`: hours may have passed since it was asked.
    """
    check_output(output, overwrite=overwrite)
    output, place = output.resolve(), folder.parent
    name = seal(folder)
    if (card := _card(place)) is not None:
        write_state(place / CARD, card | {"published": name})
    old = place / "replaced"
    if replaced := output.exists():
        shutil.rmtree(old, ignore_errors=True)
        output.replace(old)
    try:
        folder.replace(output)
    except BaseException:
        if replaced:
            old.replace(output)
        raise
    settle_folder(output.parent)
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def new_folder(output: Path, *, overwrite: bool = True) -> Iterator[Path]:
    """A folder of its own beside `output`, to be filled and then published; gone when that fails."""
    place = output.resolve()
    with tempfile.TemporaryDirectory(prefix=f".{place.name}.", dir=place.parent) as made:
        folder = Path(made) / "result"
        folder.mkdir()
        yield folder
        publish(folder, output, overwrite=overwrite)


def _beside(output: Path, suffix: str) -> Path:
    place = output.resolve()
    return place.with_name(f"{place.name}.{suffix}")


def _is_result(folder: Path) -> bool:
    """Whether we have made it: one model, a family of them, an export, or what was learnt from searches."""
    listed = sealed(folder)
    return listed is not None and (
        {"report.json", "ledger.jsonl"} <= listed.keys()
        or "pareto.json" in listed
        or "searches.json" in listed
        or "exports.json" in listed
    )


def _plain(identity: Mapping[str, Any]) -> dict[str, Any]:
    """As it will be read."""
    return json.loads(json.dumps(identity))


def _card(place: Path) -> dict[str, Any] | None:
    """What the run in a folder says of itself; None: nothing that can be read."""
    try:
        card = read_state(place / CARD)
    except Damaged:
        return None
    return card if isinstance(card, dict) and "identity" in card else None


def _strange(place: Path) -> list[str]:
    """The files in a folder of ours that no run has made."""
    names = (path.relative_to(place).as_posix() for path in files_in(place))
    return [name for name in names if not (_MADE.fullmatch(name) or is_of_result(name))]


def is_of_result(name: str) -> bool:
    """Whether a path in a working folder is that of a file of a result, also while it is written."""
    found = _RESULT.fullmatch(name)
    own = "" if found is None else found["name"].removeprefix(".")
    return any(fnmatchcase(own, pattern) for pattern in _RESULT_FILES) or is_legal(own)


def _clear(place: Path) -> None:
    """Remove all that runs have made, but the lock and the card."""
    kept = {LOCK, CARD, *_strange(place)}
    clear(place, lambda path: path.relative_to(place).as_posix() not in kept)


def _take(
    place: Path, identity: Mapping[str, Any], held: str, *, resume: bool, overwrite: bool, stays: Path | None
) -> None:
    file, wanted = place / CARD, _plain(identity)
    ours = {LOCK, CARD, temporary_of(file).name}
    if not file.exists() and any(path.name not in ours for path in place.iterdir()):
        raise WrongInput(
            f"{place} is where this run would work, but holds other files; move them, or choose another --output"
        )
    if file.exists():
        card = _card(place)
        found = {} if card is None else card["identity"]
        differ = sorted(k for k in wanted.keys() | found.keys() if wanted.get(k) != found.get(k))
        if card is not None and not differ and resume:
            return
        if not overwrite:
            what = f"(another {', '.join(differ)})" if differ else "and --no-resume was asked"
            if card is None:
                what = f"of which {file} is damaged"
            raise WrongInput(f"{place} holds {held} {what}; go on with its own command, or discard it with --overwrite")
    known = {f"{stays}{more}" for more in ("", "-journal", "-wal", "-shm")}  # as SQLite names what belongs to it
    if mine := [name for name in _strange(place) if str(place.resolve() / name) not in known]:
        raise WrongInput(f"{place} holds {mine[0]}, which prunekit has not made; move it, or choose another --output")
    _clear(place)
    write_state(file, {"identity": wanted})
