"""Files written tensor by tensor are those that safetensors and transformers write."""

import pytest
import torch
from safetensors.torch import save_file

from prunekit.export.hf import save
from prunekit.models.shards import Shards, file_bytes, write
from prunekit.testing import tiny

TENSORS = {
    "b.x": torch.randn(3, 4),
    "a": torch.randn(5).bfloat16(),
    "m": torch.zeros(7, dtype=torch.uint8),
    "é": torch.arange(3),
    "d": torch.randn(2).double(),
    "i": torch.arange(3, dtype=torch.int32),
    "h": torch.randn(3).half(),
    "one": torch.tensor(1.0),
}


def test_a_file_is_the_librarys_byte_for_byte(tmp_path):
    save_file(TENSORS, tmp_path / "theirs", metadata={"format": "pt"})
    write(tmp_path, TENSORS, TENSORS.__getitem__)
    assert (tmp_path / "model.safetensors").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_bytes_are_told_before_the_file_is_there(tmp_path):
    save_file(TENSORS, tmp_path / "file")
    assert file_bytes({n: (t.dtype, t.shape) for n, t in TENSORS.items()}) == (tmp_path / "file").stat().st_size


def test_what_was_written_is_read(tmp_path):
    write(tmp_path, TENSORS, TENSORS.__getitem__, shard_bytes=30)
    shards = Shards.of(str(tmp_path))
    assert len(shards.files) > 3
    assert shards.tensors.keys() == TENSORS.keys()
    assert all(torch.equal(shards.read(name), value) for name, value in TENSORS.items())


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt_neox"])
def test_shards_and_index_are_those_of_transformers(family, tmp_path, monkeypatch):
    model = tiny(family)
    model.save_pretrained(tmp_path / "theirs", max_shard_size="20KB")
    monkeypatch.setattr("prunekit.export.hf.pager_of", lambda _: model)  # so that it is written tensor by tensor
    save(model, tmp_path / "ours", max_shard_size="20KB")
    files = sorted(file.name for file in (tmp_path / "theirs").iterdir())
    assert files == sorted(file.name for file in (tmp_path / "ours").iterdir())
    assert "model.safetensors.index.json" in files
    for name in files:
        assert (tmp_path / "ours" / name).read_bytes() == (tmp_path / "theirs" / name).read_bytes(), name
