"""Files that are there whole or not at all, and that say so themselves when they have been changed."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from prunekit.errors import CannotGoOn, WrongInput, first_line

SEAL = "files.json"  # in a folder of ours: what we have put there
_MADE_BY = "prunekit"
MOST_BYTES = 1 << 26  # of a file that is read at once
MODEL_FILES = (  # of what transformers writes of a model; reports of ours and other exports lie beside them
    "*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json", "modeling_prunekit.py",
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "chat_template*", "vocab*", "merges.txt", "*.model",
    "*.tiktoken", "spiece*", "*processor_config.json", "additional_chat_templates/*",
)  # fmt: skip


class Damaged(CannotGoOn):
    """A file is not what was written."""


def check_name(name: str | Path) -> None:
    """Refuse a name with bytes that are no text, which no recipe could name and safetensors cannot open.

    Raises:
        WrongInput: it is one.
    """
    try:
        str(name).encode()
    except UnicodeEncodeError:
        raise WrongInput(f"{str(name)!r} is not UTF-8; rename it") from None


def settle(path: Path) -> None:
    """Wait until a file is on disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def settle_folder(path: Path) -> None:
    """Wait until what a folder names is on disk: a file whose name is lost is lost."""
    if os.name == "nt":  # folders cannot be opened there
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_bytes(path: Path, content: bytes) -> None:
    """Write beside, then rename: a reader sees the old file or the new one."""
    temporary = temporary_of(path)
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    settle_folder(path.parent)


def temporary_of(path: Path) -> Path:
    """Where a file is written until it is whole."""
    return path.with_name(f".{path.name}")


def write_json(path: Path, content: object) -> None:
    """As `write_bytes`, of JSON."""
    write_bytes(path, json.dumps(content, indent=1).encode())


def read_json(path: Path) -> dict[str, Any]:
    """Read a mapping that anyone may have written.

    Raises:
        WrongInput: the file is not there or holds something else.
    """
    try:
        if path.stat().st_size > MOST_BYTES:
            raise ValueError(f"it has more than {MOST_BYTES:,} bytes")
        found = json.loads(path.read_text(encoding="utf-8"))
    except RecursionError as error:
        raise WrongInput(f"{path} cannot be read: it is nested too deeply") from error
    except (OSError, ValueError) as error:
        raise WrongInput(f"{path} cannot be read: {getattr(error, 'strerror', None) or first_line(error)}") from error
    if not isinstance(found, dict):
        raise WrongInput(f"{path} cannot be read: it holds {type(found).__name__}, not a mapping of keys to values")
    return found


def write_state(path: Path, content: object) -> None:
    """Write JSON that is read again after an interruption, with its digest."""
    write_json(path, {"sha256": _digest_of(content), "content": content})


def read_state(path: Path) -> Any:
    """Read what `write_state` has written.

    Raises:
        Damaged: it is something else.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        content, said = found["content"], found["sha256"]
    except (OSError, ValueError, RecursionError, TypeError, KeyError) as error:
        raise Damaged(f"{path} is damaged: it is not what prunekit has written") from error
    if _digest_of(content) != said:
        raise Damaged(f"{path} is damaged: it was changed after it was written")
    return content


def digest(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def seal(folder: Path) -> str:
    """Write down what is in a folder, with digests, and wait until all of it is on disk.

    What was put into a sealed folder inside of it is not written down.

    Returns:
        The digest of that list.
    """
    for old in (folder / SEAL, temporary_of(folder / SEAL)):
        old.unlink(missing_ok=True)
    theirs = {inside.parent / name for inside in folder.rglob(SEAL) for name in others(inside.parent)}
    files = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": digest(path)}
        for path in files_in(folder)
        if path not in theirs
    }
    for path in files_in(folder):
        settle(path)
    for path in (folder, *(path for path in folder.rglob("*") if path.is_dir())):
        settle_folder(path)
    write_json(folder / SEAL, {"made by": _MADE_BY, "files": files})
    return digest(folder / SEAL)


def extend_seal(folder: Path, names: Sequence[str]) -> None:
    """Add files to what is written down of a sealed folder, and to what a sealed folder around it says of this one.

    Args:
        folder: sealed.
        names: of files in it that we have put there since.
    """
    listed = sealed(folder)
    assert listed is not None
    for name in names:
        settle(folder / name)
        listed[name] = {"bytes": (folder / name).stat().st_size, "sha256": digest(folder / name)}
    write_json(folder / SEAL, {"made by": _MADE_BY, "files": dict(sorted(listed.items()))})
    around, inside = folder.resolve().parent, folder.resolve().name
    if f"{inside}/{SEAL}" in (sealed(around) or {}):
        extend_seal(around, [f"{inside}/{name}" for name in (SEAL, *names)])


def sealed(folder: Path) -> dict[str, dict[str, Any]] | None:
    """What is written down of a folder, by file; None: it is no folder of ours."""
    try:
        found = json.loads((folder / SEAL).read_text(encoding="utf-8"))
        if found["made by"] != _MADE_BY:
            return None
        if any(Path(name).is_absolute() or ".." in Path(name).parts for name in found["files"]):
            return None  # files are copied, and looked at, by these names
        return {
            str(name): {"bytes": int(said["bytes"]), "sha256": str(said["sha256"])}
            for name, said in found["files"].items()
        }
    except (OSError, ValueError, RecursionError, TypeError, KeyError, AttributeError):
        return None


def changed(folder: Path) -> list[str]:
    """Files of a sealed folder that are gone, or not what they were."""
    listed = sealed(folder)
    if listed is None:
        return [SEAL]
    return [name for name, said in listed.items() if not _is_as(folder / name, said)]


def copy_sealed(folder: Path, target: Path) -> None:
    """Copy what a sealed folder lists, byte for byte.

    Raises:
        Damaged: a file is not what was written.
    """
    for name in (*(sealed(folder) or {}), SEAL):
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        if (folder / name).is_file():
            shutil.copy2(folder / name, target / name)
    if faults := changed(target):
        raise Damaged(f"{folder / faults[0]} is not what was written when the result was made; bring it back")


def others(folder: Path) -> list[str]:
    """Files in a sealed folder that were not there when it was sealed."""
    listed = (sealed(folder) or {}).keys() | {SEAL}
    return sorted({path.relative_to(folder).as_posix() for path in files_in(folder)} - listed)


def clear(folder: Path, made: Callable[[Path], object]) -> Sequence[Path]:
    """Remove the files of a folder that we have made, and it and the folders in it where they are empty then.

    Returns:
        The files that stay.
    """
    if not folder.is_dir() or folder.is_symlink():
        return [folder] if folder.is_symlink() or folder.exists() else []
    for path in files_in(folder):
        if made(path):
            path.unlink()
    inside = (path for path in folder.rglob("*") if path.is_dir() and not path.is_symlink())
    for each in (*sorted(inside, reverse=True), folder):
        if not any(each.iterdir()):
            each.rmdir()
    return files_in(folder)


def _is_as(path: Path, said: dict[str, Any]) -> bool:
    try:
        return path.stat().st_size == said["bytes"] and digest(path) == said["sha256"]
    except OSError:
        return False


def files_in(folder: Path) -> Sequence[Path]:
    """All that is in a folder and those below it, but folders; links are not followed."""
    return sorted(path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())


def _digest_of(content: object) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
