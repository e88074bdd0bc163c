"""What goes to the hub: a card that its own library reads, the files that the result lists, and nothing by itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard

from prunekit.errors import CannotGoOn, WrongInput
from prunekit.export import hub
from prunekit.export.metadata import faults_in
from prunekit.recipe.resolve import resolve
from prunekit.recipe.schema import Recipe
from prunekit.report.card import card
from prunekit.system.files import seal
from prunekit_strategies.exporters.hf import HF

SITE = {"name": "model.layers.0.mlp.down_proj", "groups": 8, "kept": 4, "error": 0.1}
SIDE = {"parameters": 100, "block_parameters": 80, "sparsity_of_blocks": 0.5}
REPORT: dict[str, Any] = {
    "model": "owner/dense",
    "dense": SIDE,
    "pruned": SIDE,
    "losses": {which: {"perplexity": 9.0, "label": "a text"} for which in ("dense", "pruned")},
    "sites": [SITE],
    "data": {"source": "a text"},
    "versions": {"prunekit": "1"},
    "budget": {"metric": "parameters"},
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A result, as far as the hub sees it."""
    text = card(REPORT, Recipe.load(), {"license": "apache-2.0", "language": ["en", "no"]})
    (tmp_path / "README.md").write_text(text, encoding="utf-8")
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    seal(tmp_path)
    (tmp_path / "notes.txt").write_text("mine alone")
    return tmp_path


class Stub:
    """A client that writes down what it was asked."""

    asked: list[tuple[str, Any]]

    def __init__(self) -> None:
        pass

    def create_repo(self, name: str, **options: Any) -> str:
        self.asked.append(("create", (name, options)))
        return f"https://hub.example/{name}"

    def upload_folder(self, **options: Any) -> None:
        self.asked.append(("upload", options))


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Any]]:
    calls: list[tuple[str, Any]] = []
    monkeypatch.setattr(Stub, "asked", calls, raising=False)
    monkeypatch.setattr(hub, "HfApi", Stub)
    return calls


def test_the_card_is_read_by_the_library_of_the_hub(folder: Path) -> None:
    found: Any = ModelCard((folder / "README.md").read_text(encoding="utf-8")).data
    assert (found.base_model, found.library_name, found.license) == ("owner/dense", "transformers", "apache-2.0")
    assert found.language == ["en", "no"]
    assert {"prunekit", "pruned"} <= set(found.tags or [])
    assert found.pipeline_tag == "text-generation"
    hub.check_card(folder)


RESULT = {
    "task": {"type": "text-generation"},
    "dataset": {"type": "wikitext", "name": "WikiText-2"},
    "metrics": [{"type": "perplexity", "value": 9.1}],
}


def index_of(**changes: Any) -> dict[str, Any]:
    return {"model-index": [{"name": "half", "results": [RESULT | changes]}]}


@pytest.mark.parametrize(
    "metadata",
    [
        {},
        {"license": "openrail++", "language": "en", "base_model": ["a/b", "gpt2"], "tags": []},
        {"license": "other", "license_name": "mine", "license_link": "LICENSE", "language": ["no", "code", "haw"]},
        index_of(),
        {"model-index": [{"name": "half", "results": []}]},
    ],
)
def test_metadata_as_the_hub_describes_it_passes(metadata: dict[str, Any]) -> None:
    assert [*faults_in(metadata)] == []


@pytest.mark.parametrize(
    ("metadata", "sentence"),
    [
        ({"license": "Apache-2.0"}, "license is an identifier in small letters, as apache-2.0, not 'Apache-2.0'"),
        ({"license": ["mit"]}, "license is an identifier"),
        ({"license": "other"}, "license other needs a license_name"),
        ({"license_link": 3}, "license_link is an address"),
        ({"language": ["en", False]}, "quoted where YAML reads false, not False"),
        ({"language": "English"}, "not 'English'"),
        ({"language": "en-US"}, "not 'en-US'"),
        ({"tags": "pruned"}, "tags is a list of texts, not 'pruned'"),
        ({"tags": ["a", 2]}, "tags is a list of texts"),
        ({"pipeline_tag": "text generation"}, "as text-generation, not 'text generation'"),
        ({"library_name": "my library"}, "library_name is one word"),
        ({"base_model": "/home/me/model"}, "base_model is a repository, as owner/name, not '/home/me/model'"),
        ({"base_model": ["a/b", 3]}, "base_model is a repository"),
        ({"model-index": {"name": "half"}}, "model-index is a list of models, each with a name"),
        ({"model-index": [{"name": "half"}]}, "half has no list of results"),
        (index_of(task={}), "a result of half has no task.type"),
        (index_of(dataset={"type": "wikitext"}), "a result of half has no dataset.name"),
        (index_of(metrics=[{"type": "perplexity"}]), "a result of half has no metrics, each with type and value"),
        (index_of(metrics=[]), "a result of half has no metrics"),
    ],
)
def test_metadata_that_the_hub_would_refuse_is_told_in_a_sentence(
    metadata: dict[str, Any], sentence: str, tmp_path: Path
) -> None:
    (fault,) = faults_in(metadata)
    assert sentence in fault
    (tmp_path / "README.md").write_text(f"---\n{yaml.safe_dump(metadata)}---\n")
    with pytest.raises(WrongInput, match=r"README\.md is no card that the hub takes"):
        hub.check_card(tmp_path)


def test_a_card_that_the_hub_would_refuse_is_refused_before_anything_is_sent(
    folder: Path, asked: list[tuple[str, Any]]
) -> None:
    for text in ("- a list, no mapping", "tags: [a", "license: Apache-2.0"):
        (folder / "README.md").write_text(f"---\n{text}\n---\n")
        with pytest.raises(WrongInput, match=r"README\.md is no card that the hub takes"):
            hub.upload(folder, "me/pruned")
    assert asked == []


def test_what_the_result_lists_is_sent_and_nothing_else(folder: Path, asked: list[tuple[str, Any]]) -> None:
    assert HF(push_to_hub="me/pruned").deliver(folder) == "https://hub.example/me/pruned"
    (_, (name, made)), (_, sent) = asked
    assert (name, made) == ("me/pruned", {"private": True, "exist_ok": True})
    assert (sent["repo_id"], sent["folder_path"]) == ("me/pruned", folder)
    assert sorted(sent["allow_patterns"]) == ["README.md", "files.json", "model.safetensors"]


def test_nothing_is_sent_unless_it_is_asked_for(folder: Path, asked: list[tuple[str, Any]]) -> None:
    assert HF().deliver(folder) is None
    assert asked == []


def test_what_did_not_arrive_says_where_the_result_is(
    folder: Path, asked: list[tuple[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError("403 Forbidden")

    monkeypatch.setattr(Stub, "upload_folder", refuse)
    with pytest.raises(CannotGoOn, match=r"is whole and verified, but was not uploaded to 'me/pruned': 403 Forbidden"):
        hub.upload(folder, "me/pruned")


@pytest.mark.parametrize("name", ["pruned", "a/b/c", "me/pru ned", "", "me/--"])
def test_a_name_that_is_no_repository_is_refused_at_once(name: str) -> None:
    with pytest.raises(WrongInput, match="is no repository of the hub"):
        HF(push_to_hub=name)


def test_a_repository_that_only_a_file_names_does_not_count(tmp_path: Path) -> None:
    (tmp_path / "theirs.yaml").write_text("exporters: [{name: hf, push_to_hub: theirs/models}]\n")
    recipe = Recipe.load(tmp_path / "theirs.yaml")
    with pytest.raises(WrongInput, match="push_to_hub"):
        resolve(recipe)
    mine = recipe.with_overrides({"exporters.hf.push_to_hub": "me/models"})
    assert mine.exporters[0]["push_to_hub"] == "me/models"
