"""The rules that the hub publishes for the metadata of a model card, as far as they can be followed without it.

Its page on model cards and the template there (`modelcard.md` of hub-docs) say which fields there are, and which parts
of a `model-index` are required; the hub refuses a card that breaks them. Which licences it lists, only the hub knows.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

LICENSE = re.compile(r"[a-z0-9]+([.+-]+[a-z0-9]+)*\+*")  # apache-2.0, openrail++: never in capitals
LANGUAGE = re.compile(r"[a-z]{2,3}|code|multilingual")  # ISO 639-1, 639-2 or 639-3; regions stand in language_bcp47
WORD = re.compile(r"[A-Za-z0-9][\w.-]*")  # of a library
TASKS = (  # of the hub's, what a language model can be for
    "text-generation", "image-text-to-text", "any-to-any", "text-classification", "token-classification",
    "question-answering", "summarization", "translation", "feature-extraction", "sentence-similarity", "text-ranking",
)  # fmt: skip
REQUIRED = (("task", ("type",)), ("dataset", ("type", "name")))  # of a result in model-index, each a text


def faults_in(metadata: Mapping[str, Any]) -> Iterator[str]:
    """Say what in the metadata of a card, as YAML reads it, the hub would refuse: one sentence for each.

    Args:
        metadata: what stands between the two lines of dashes.
    """
    license_, name = metadata.get("license"), metadata.get("license_name")
    if license_ is not None and not (isinstance(license_, str) and LICENSE.fullmatch(license_)):
        yield f"license is an identifier in small letters, as apache-2.0, not {license_!r}"
    if license_ == "other" and not (isinstance(name, str) and name):
        yield "license other needs a license_name"
    for key, kind in (("license_name", "a text"), ("license_link", "an address, or a file of the repository")):
        if (value := metadata.get(key)) is not None and not _is_text(value):
            yield f"{key} is {kind}, not {value!r}"
    for language in _several(metadata.get("language")):
        if not (isinstance(language, str) and LANGUAGE.fullmatch(language)):
            yield f"language is a code of two or three small letters, quoted where YAML reads false, not {language!r}"
    tags = metadata.get("tags", [])
    if not isinstance(tags, list) or not all(map(_is_text, tags)):
        yield f"tags is a list of texts, not {tags!r}"
    if (task := metadata.get("pipeline_tag")) is not None and task not in TASKS:
        yield f"pipeline_tag is a task of a language model on the hub, as {TASKS[0]}, not {task!r}"
    library = metadata.get("library_name")
    if library is not None and not (isinstance(library, str) and WORD.fullmatch(library)):
        yield f"library_name is one word, as transformers, not {library!r}"
    for base in _several(metadata.get("base_model")):
        if not _is_repository(base):
            yield f"base_model is a repository, as owner/name, not {base!r}"
    if (index := metadata.get("model-index")) is not None:
        yield from _faults_in_index(index)


def _faults_in_index(index: Any) -> Iterator[str]:
    if not isinstance(index, list) or not all(
        isinstance(each, Mapping) and _is_text(each.get("name")) for each in index
    ):
        yield "model-index is a list of models, each with a name"
        return
    for model in index:
        results = model.get("results")
        if not isinstance(results, list) or not all(isinstance(result, Mapping) for result in results):
            yield f"model-index: {model['name']} has no list of results"
            continue
        for result in results:
            for part, keys in REQUIRED:
                found = result.get(part)
                for key in keys:
                    if not isinstance(found, Mapping) or not _is_text(found.get(key)):
                        yield f"model-index: a result of {model['name']} has no {part}.{key}"
            metrics = result.get("metrics")
            if not (isinstance(metrics, list) and metrics and all(map(_is_metric, metrics))):
                yield f"model-index: a result of {model['name']} has no metrics, each with type and value"


def _is_metric(metric: Any) -> bool:
    return isinstance(metric, Mapping) and _is_text(metric.get("type")) and metric.get("value") is not None


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _several(value: Any) -> list[Any]:
    """What is given alone or as a list."""
    return [] if value is None else value if isinstance(value, list) else [value]


def _is_repository(value: Any) -> bool:
    try:
        validate_repo_id(value)
    except HFValidationError:
        return False
    return True
