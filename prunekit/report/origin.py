"""What a pruned model takes over from its source: licence, language, legal files, SentencePiece models, processors."""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")  # owner/name
TOKENIZERS = ("tokenizer.model", "tokenizer.model.v3", "spiece.model", "sentencepiece.bpe.model")
PROCESSORS = (  # what images are made into, and how a dialogue with them is written
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "chat_template.json",
)
LEGAL = re.compile(r"(licen[cs]e|notice|use_policy|copying)[\w .-]*", re.IGNORECASE)
TEXTS = re.compile(r"(\.(md|txt|rst|html|pdf|\d+))?", re.IGNORECASE)  # what legal files end in; no code, no weights
MOST_BYTES = 2**20  # of one file
MOST_TOKENIZER_BYTES = 2**25
MOST_FILES = 16
MOST_LETTERS = 200  # of one value
MOST_VALUES = 500  # of a list
SECONDS = 10  # to wait for the hub


def hub_id(source: str) -> str | None:
    """Find the hub id that a source is, owner/name; None: it is a folder."""
    return source if HUB_ID.fullmatch(source) and not Path(source).expanduser().exists() else None


def taken_over(source: str) -> tuple[dict[str, Any], dict[str, bytes]]:
    """(licence and language in the words of the source's card, content of its legal files, SentencePiece models and
    processors' settings).

    Both are empty where the source is unknown. Its card is read as data that may be anything.
    """
    folder = Path(source).expanduser()
    if hub_id(source) is not None:
        folder = _snapshot(source)
    if folder is None or not folder.is_dir():
        return {}, {}
    names = sorted(file.name for file in folder.iterdir() if is_legal(file.name))[:MOST_FILES]
    legal = {name: content for name in names if (content := _read(folder / name)) is not None}
    facts = _front_matter((_read(folder / "README.md") or b"").decode(errors="replace"))
    facts = {key: value for key in facts if (value := _checked(key, facts[key], legal)) is not None}
    for name in TOKENIZERS:  # which transformers does not write again, and other runtimes read
        if (content := _read(folder / name, MOST_TOKENIZER_BYTES)) is not None:
            legal[name] = content
    for name in PROCESSORS:  # which a tokenizer does not write
        if (content := _read(folder / name)) is not None:
            legal[name] = content
    return facts, legal


def is_legal(name: str) -> bool:
    """Whether a file of this name is taken over."""
    return LEGAL.fullmatch(name) is not None and TEXTS.fullmatch(Path(name).suffix) is not None


def _snapshot(repository: str) -> Path | None:
    """Where the cache of the hub holds the model that was opened, with its legal files where they can be had."""
    from huggingface_hub import HfApi, constants, hf_hub_download, try_to_load_from_cache

    config = try_to_load_from_cache(repository, "config.json")
    if not isinstance(config, str):
        return None
    folder = Path(config).parent
    if not constants.HF_HUB_OFFLINE:
        with suppress(Exception):  # a run does not fail for want of a network
            found = HfApi().model_info(repository, revision=folder.name, timeout=SECONDS, files_metadata=True)
            for file in found.siblings or []:
                wanted = is_legal(file.rfilename) or file.rfilename in ("README.md", *PROCESSORS)
                if wanted and (file.size or 0) <= MOST_BYTES:
                    hf_hub_download(repository, file.rfilename, revision=folder.name, etag_timeout=SECONDS)
    return folder


def _read(file: Path, most: int = MOST_BYTES) -> bytes | None:
    """Its content; None: it is no file of this source, or too large."""
    # the files of a snapshot in the hub's cache are links to blobs beside it
    root = file.parent.parent.parent if file.parent.parent.name == "snapshots" else file.parent
    try:
        place = file.resolve()
        if not (place.is_relative_to(root.resolve()) and place.is_file() and place.stat().st_size <= most):
            return None
        return place.read_bytes()
    except OSError:
        return None


def _front_matter(text: str) -> dict[str, Any]:
    """The four keys of a card's YAML, all values as texts; empty where it is no mapping."""
    found = re.match(r"---\s*\n(.*?\n)---\s*(\n|$)", text, re.DOTALL)
    try:  # texts alone: of the languages, `no` is not False
        values = yaml.load(found[1], yaml.BaseLoader) if found is not None else None
    except (yaml.YAMLError, ValueError, RecursionError):
        return {}
    known = ("license", "license_name", "license_link", "language")
    return {key: values[key] for key in known if key in values} if isinstance(values, dict) else {}


def _checked(key: str, value: Any, legal: Mapping[str, bytes]) -> Any:
    """A value that may stand in a card: a short line, for a language several, for a link one that leads somewhere."""
    if key == "language" and isinstance(value, list):
        return [text for text in value[:MOST_VALUES] if _is_line(text)] or None
    if not _is_line(value) or (key == "license_link" and not value.startswith("https://") and value not in legal):
        return None
    return value


def _is_line(value: Any) -> bool:
    return isinstance(value, str) and value.isprintable() and 0 < len(value) <= MOST_LETTERS
