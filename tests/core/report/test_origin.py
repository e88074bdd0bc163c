"""What is taken over from a source is its licence, language and legal files; a source may hold anything."""

import os
from types import SimpleNamespace

import pytest

from prunekit.report.origin import MOST_BYTES, hub_id, is_legal, taken_over


def source(folder, front="", **files):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "README.md").write_text(front)
    for name, text in files.items():
        (folder / name).write_text(text)
    return str(folder)


def test_licence_and_language_are_taken_in_their_own_words(tmp_path):
    front = (
        "---\nlicense: other\nlicense_name: llama3.2\nlicense_link: https://example.org/licence\n"
        "language:\n- en\n- no\ndatasets: [x]\nwidget: {a: b}\n---\n# Title\nlicense: mit\n"
    )
    facts, legal = taken_over(source(tmp_path / "m", front, LICENSE="text", NOTICE="more"))
    assert facts == {
        "license": "other",
        "license_name": "llama3.2",
        "license_link": "https://example.org/licence",
        "language": ["en", "no"],
    }
    assert legal == {"LICENSE": b"text", "NOTICE": b"more"}


@pytest.mark.parametrize(
    "front",
    [
        "",
        "license: mit\n",
        "---\nlicense: mit\n",
        "---\n- license: mit\n---\n",
        "---\nmit\n---\n",
        "---\n{unbalanced: [\n---\n",
        "---\n!!python/object/apply:os.system ['true']\n---\n",
        "---\nlicense: {a: b}\nlanguage: {a: b}\nlicense_name: [a]\n---\n",
        "---\nlicense: ''\nlanguage: []\n---\n",
        '---\nlicense: "mit\\nbase_model: theirs"\n---\n',
        f"---\nlicense: {'x' * 1000}\n---\n",
        f"---\nlicense: {'[' * 5000}{']' * 5000}\n---\n",
        "---\na: &a [x,x,x,x,x,x,x,x,x]\nb: &b [*a,*a,*a,*a,*a,*a,*a,*a]\nlanguage: [*b,*b,*b,*b,*b]\n---\n",
        f"---\nlicense: mit\n{'# padding' * MOST_BYTES}\n---\n",
        "---\nlicense_link: /home/me/LICENSE\n---\n",
        "---\nlicense_link: ../LICENSE\n---\n",
        "---\nlicense_link: LICENSE\n---\n",  # which is not there
        "---\nlicense_link: javascript:alert(1)\n---\n",
    ],
)
def test_a_hostile_card_gives_nothing(tmp_path, front):
    assert taken_over(source(tmp_path / "m", front)) == ({}, {})


def test_a_link_to_a_file_that_is_taken_along_stays(tmp_path):
    facts, _ = taken_over(source(tmp_path / "m", "---\nlicense_link: LICENSE\n---\n", LICENSE="x"))
    assert facts == {"license_link": "LICENSE"}


def test_only_files_of_the_source_itself_are_taken(tmp_path):
    (tmp_path / "secret").write_text("key")
    folder = tmp_path / "m"
    path = source(folder, Licence="x", COPYING="y")
    (folder / "LICENSE").symlink_to(tmp_path / "secret")
    (folder / "LICENSE.md").symlink_to(folder / "COPYING")
    (folder / "LICENSE.txt").symlink_to(folder / "nowhere")
    (folder / "NOTICE").mkdir()
    os.mkfifo(folder / "USE_POLICY.md")
    (folder / "notice.txt").write_bytes(b"x" * (MOST_BYTES + 1))
    assert taken_over(path) == ({}, {"COPYING": b"y", "LICENSE.md": b"y", "Licence": b"x"})
    (folder / "README.md").unlink()
    (tmp_path / "card").write_text("---\nlicense: mit\n---\n")
    (folder / "README.md").symlink_to(tmp_path / "card")
    assert taken_over(path)[0] == {}


def test_many_legal_files_are_not_all_taken(tmp_path):
    assert len(taken_over(source(tmp_path / "m", **{f"LICENSE-{n}": "x" for n in range(40)}))[1]) == 16


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("LICENSE", True), ("license.txt", True), ("LICENCE.md", True), ("LICENSE-2.0", True), ("Notice.txt", True),
        ("USE_POLICY.md", True), ("COPYING", True), ("Llama LICENSE", False), ("license.py", False),
        ("LICENSE.safetensors", False), ("notice.json", False), ("model.safetensors", False), ("docs/LICENSE", False),
        ("copying.html", True), ("", False),
    ],
)  # fmt: skip
def test_legal_files_are_known_by_their_names(name, wanted):
    assert is_legal(name) == wanted


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("meta-llama/Llama-3.2-1B", True),
        ("gpt2", False),
        ("/a/b", False),
        ("./a", False),
        ("a/b/c", False),
        ("~/x", False),
    ],
)
def test_a_hub_id_is_owner_and_name(name, found):
    assert hub_id(name) == (name if found else None)


def test_a_folder_that_is_there_is_no_hub_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner/name").mkdir(parents=True)
    assert hub_id("owner/name") is None


# -- on the hub -----------------------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A cache with one model, as the hub's client lays it out: files are links to blobs."""
    snapshot = tmp_path / "models--owner--name/snapshots/abc"
    snapshot.mkdir(parents=True)
    (tmp_path / "models--owner--name/blobs").mkdir()
    for name, text in {"config.json": "{}", "README.md": "---\nlicense: mit\n---\n", "LICENSE": "text"}.items():
        blob = tmp_path / "models--owner--name/blobs" / name.lower()
        blob.write_text(text)
        (snapshot / name).symlink_to(blob)
    monkeypatch.setattr(
        "huggingface_hub.try_to_load_from_cache",
        lambda repo, name: str(snapshot / name) if repo == "owner/name" else None,
    )
    return snapshot


def test_a_source_on_the_hub_is_read_from_the_cache(cache):
    assert taken_over("owner/name") == ({"license": "mit"}, {"LICENSE": b"text"})
    assert taken_over(str(cache)) == ({"license": "mit"}, {"LICENSE": b"text"})
    assert taken_over("owner/other") == ({}, {})


def test_what_the_cache_lacks_is_asked_for_once_at_the_same_revision(cache, monkeypatch):
    got = []
    there = {"NOTICE": 4, "LICENSE.txt": MOST_BYTES + 1, "docs/NOTICE": 4, "model.safetensors": 4, "README.md": 5}
    listed = SimpleNamespace(siblings=[SimpleNamespace(rfilename=name, size=size) for name, size in there.items()])

    def download(repo, name, revision, etag_timeout):
        got.append((repo, name, revision))
        (cache / name).write_text("told") if name == "NOTICE" else None

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(
        "huggingface_hub.HfApi.model_info", lambda *_, revision, **__: listed if revision == "abc" else 1
    )
    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    assert taken_over("owner/name")[1] == {"LICENSE": b"text", "NOTICE": b"told"}
    assert got == [("owner/name", "NOTICE", "abc"), ("owner/name", "README.md", "abc")]


def test_a_hub_that_does_not_answer_is_no_reason_to_fail(cache, monkeypatch):
    def broken(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", broken)
    assert taken_over("owner/name") == ({"license": "mit"}, {"LICENSE": b"text"})
