"""A result on the hub: a repository, all files that the result lists, in one commit."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import HfApi, ModelCard, metadata_load
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from yaml import YAMLError

from prunekit.errors import CannotGoOn, WrongInput, first_line, one_line
from prunekit.export.metadata import faults_in
from prunekit.system.files import SEAL, sealed

CARD = "README.md"


def check_repository(name: str) -> None:
    """Refuse what is no name of a repository with its owner.

    Raises:
        WrongInput: it is none.
    """
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise WrongInput(f"{name!r} is no repository of the hub: {first_line(error)}") from error
    if name.count("/") != 1:
        raise WrongInput(f"{name!r} is no repository of the hub; give owner/name")


def check_card(folder: Path) -> None:
    """Read the card's metadata as the hub's own library does, and hold it against the rules that the hub publishes.

    Raises:
        WrongInput: it would be refused.
    """
    try:
        ModelCard((folder / CARD).read_text(encoding="utf-8")).data.to_dict()
        faults = [*faults_in(metadata_load(folder / CARD) or {})]
    except (OSError, ValueError, YAMLError) as error:
        raise WrongInput(f"{folder / CARD} is no card that the hub takes: {first_line(error)}") from error
    if faults:
        raise WrongInput(f"{folder / CARD} is no card that the hub takes: {'; '.join(faults)}")


def upload(folder: Path, repository: str) -> str:
    """Upload the files that a result lists. A repository that is not there is made, to be seen by its owner alone.

    Args:
        folder: of a result.
        repository: owner/name.

    Returns:
        Its address.

    Raises:
        CannotGoOn: it was not taken; the result is where it is.
    """
    check_card(folder)
    api, names = HfApi(), sorted(sealed(folder) or {})
    try:
        made = api.create_repo(repository, private=True, exist_ok=True)
        api.upload_folder(
            repo_id=repository, folder_path=folder, commit_message="A model pruned by prunekit",
            allow_patterns=[*names, SEAL] if names else None,
        )  # fmt: skip
    except Exception as error:  # of the network, of the hub, of whoever may write there
        raise CannotGoOn(
            f"{folder} is whole and verified, but was not uploaded to {repository!r}: {one_line(error)}"
        ) from error
    return str(made)
