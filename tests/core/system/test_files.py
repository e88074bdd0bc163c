"""What is read again is what was written, or it is said."""

import json
import os
from pathlib import Path

import pytest
import torch

from prunekit.system.checkpoints import Checkpoints
from prunekit.system.files import Damaged, changed, clear, others, read_state, seal, sealed, write_state


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    place = tmp_path / "result"
    (place / "below").mkdir(parents=True)
    (place / "weights").write_bytes(bytes(range(256)))
    (place / "below/ä").write_text("x")
    seal(place)
    return place


def test_a_sealed_folder_knows_what_was_changed_and_what_is_new(folder: Path) -> None:
    assert changed(folder) == others(folder) == []
    (folder / "below/ä").unlink()
    (folder / "link").symlink_to("nowhere")
    with (folder / "weights").open("r+b") as file:
        file.write(b"\x01")
    assert changed(folder) == ["below/ä", "weights"]
    assert others(folder) == ["link"]


def test_what_was_put_into_a_folder_that_was_sealed_is_not_sealed_with_what_is_around_it(folder: Path) -> None:
    (folder / "theirs").touch()
    seal(folder.parent)
    assert others(folder.parent) == ["result/theirs"]


@pytest.mark.parametrize("name", ["../theirs", "below/../../theirs", "/etc/hosts"])
def test_a_list_that_leads_out_of_its_folder_is_none(folder: Path, name: str) -> None:
    listed = json.loads((folder / "files.json").read_text())
    listed["files"][name] = listed["files"]["weights"]
    (folder / "files.json").write_text(json.dumps(listed))
    assert sealed(folder) is None


def test_a_folder_is_cleared_of_what_is_ours(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/weights").touch()
    (folder / "link").symlink_to(tmp_path / "elsewhere")
    (folder / "empty").mkdir()
    assert clear(folder, lambda path: path.name in ("weights", "files.json")) == [folder / "below/ä", folder / "link"]
    assert sorted(path.name for path in folder.iterdir()) == ["below", "link"]
    assert clear(folder / "link", lambda _: True) == [folder / "link"]
    assert (tmp_path / "elsewhere/weights").exists()
    assert clear(folder, lambda _: True) == []
    assert not folder.exists()


def test_a_folder_that_says_nothing_of_itself_is_not_ours(tmp_path: Path) -> None:
    assert sealed(tmp_path) is None
    assert changed(tmp_path) == ["files.json"]


def test_all_of_a_folder_is_on_disk_before_it_is_sealed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settled, real = set[tuple[int, int]](), os.fsync

    def fsync(descriptor: int) -> None:
        found = os.fstat(descriptor)
        settled.add((found.st_dev, found.st_ino))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    seal(folder)
    for path in (folder, *folder.rglob("*")):
        assert (path.stat().st_dev, path.stat().st_ino) in settled, path


@pytest.mark.parametrize("content", [b"", b"[", b"[]", b"null", b'{"content": 1}', b"\xff", b"[" * 100_000])
def test_a_damaged_state_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "state.json"
    path.write_bytes(content)
    with pytest.raises(Damaged, match=r"state\.json is damaged"):
        read_state(path)


def test_a_state_with_another_number_in_it_is_damaged(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    write_state(path, {"loss": 0.25, "rows": [1, None]})
    assert read_state(path) == {"loss": 0.25, "rows": [1, None]}
    path.write_text(path.read_text().replace("0.25", "0.26"))
    with pytest.raises(Damaged, match="changed after it was written"):
        read_state(path)


@pytest.mark.parametrize("damage", ["bit", "short", "no seal", "other seal"])
def test_a_checkpoint_that_is_not_what_was_saved_is_not_read(tmp_path: Path, damage: str) -> None:
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save("step", {"w": torch.arange(8.0)})
    saved = checkpoints.load("step")
    assert saved is not None
    assert torch.equal(saved["w"], torch.arange(8.0))
    file, mark = tmp_path / "step.safetensors", tmp_path / "step.json"
    content = bytearray(file.read_bytes())
    if damage == "bit":
        content[-1] ^= 1
        file.write_bytes(content)
    elif damage == "short":
        file.write_bytes(content[:-4])
    elif damage == "no seal":
        mark.unlink()
    else:
        mark.write_text("[")
    assert checkpoints.load("step") is None
