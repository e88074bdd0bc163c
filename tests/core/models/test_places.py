"""A model is a folder or on the hub, and what can be neither is told at once."""

import pytest

from prunekit.errors import WrongInput
from prunekit.models.places import located


def test_a_folder_is_a_folder_and_other_names_are_of_the_hub(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "model").mkdir()
    assert located(str(tmp_path / "model")) == located("~/model") == str(tmp_path / "model")
    assert located("owner/name") == "owner/name"
    assert located("gpt2") == "gpt2"


@pytest.mark.parametrize("source", ["./gone", "/gone", "~/gone", "a/b/c"])
def test_what_can_only_be_a_folder_must_be_there(source):
    with pytest.raises(WrongInput, match=f"there is no model folder '{source}'"):
        located(source)


def test_a_file_is_no_model(tmp_path):
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(WrongInput, match="is a file; give the folder that it is in, or a hub id"):
        located(str(tmp_path / "model.safetensors"))
