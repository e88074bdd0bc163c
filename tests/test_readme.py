"""What the documents say is true: Python blocks run, commands parse, names exist, links lead somewhere."""

from __future__ import annotations

import re
import shlex
import sys
import textwrap
import tomllib
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from prunekit.cli.main import app
from prunekit.data import windows
from prunekit.plugins.registry import KINDS
from prunekit.run import family, workplace
from prunekit.run import prune as pruning

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *sorted(ROOT.glob("docs/**/*.md")),
]
BLOCK = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\((?!https?://|#)([^)#]+)")
TARGET = re.compile(r"^([\w-]+):", re.MULTILINE)

each = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))


@dataclass(frozen=True)
class Block:
    """A code block: its language, its text, and the line it begins on."""

    language: str
    text: str
    line: int


def blocks(document: Path, language: str | None = None) -> list[Block]:
    text = document.read_text(encoding="utf-8")
    found = [
        Block(match[2], textwrap.dedent(match[3]), text[: match.start(3)].count("\n") + 1)
        for match in BLOCK.finditer(text)
    ]
    return [block for block in found if language in (None, block.language)]


def running(document: Path) -> Any:
    """A case of a document whose examples run; those of the guide take half a minute."""
    marks = [pytest.mark.slow] if document.name == "guide.md" else []
    return pytest.param(document, id=str(document.relative_to(ROOT)), marks=marks)


def commands(document: Path, program: str) -> list[list[str]]:
    """Calls of a program, in shell blocks and in the text."""
    text = document.read_text(encoding="utf-8")
    lines = [line for block in blocks(document, "sh") for line in block.text.replace("\\\n", "").splitlines()]
    lines += re.findall(r"`([^`\n]+)`", BLOCK.sub("", text))
    calls = (shlex.split(line, comments=True) for line in lines if line.startswith(f"{program} "))
    return [words[1:] for words in calls]


@each
def test_blocks_say_what_language_they_are_in(document: Path) -> None:
    assert {block.language for block in blocks(document)} <= {"python", "sh", "toml", "yaml", "json", "text"}


@each
def test_links_lead_to_files(document: Path) -> None:
    targets = LINK.findall(BLOCK.sub("", document.read_text(encoding="utf-8")))
    assert not [target for target in targets if not (document.parent / target).exists()]


@pytest.mark.parametrize("document", [running(d) for d in DOCUMENTS if blocks(d, "python")])
def test_python_runs(document: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The blocks of a document are one module, run from top to bottom in an empty folder, and judged on little text."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(windows.DEFAULTS, "evaluation", windows.LEAST)
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    module = ModuleType(document.stem)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    for block in blocks(document, "python"):
        # empty lines in front, so that a traceback shows the line of the document
        exec(compile("\n" * (block.line - 1) + block.text, document, "exec"), module.__dict__)


@pytest.mark.parametrize(
    ("name", "part"), [("README.md", "Loudest"), pytest.param("docs/plugins.md", "", marks=pytest.mark.slow)]
)
def test_plugins_pass_their_suites(name: str, part: str, tmp_path: Path, forks: Any) -> None:
    code = [block.text for block in blocks(ROOT / name, "python") if part in block.text]
    (tmp_path / "test_blocks.py").write_text("\n\n".join(code), encoding="utf-8")
    script = tmp_path / "run.py"
    script.write_text("import pytest, sys\nsys.exit(pytest.main(sys.argv[1:]))\n")
    command = [sys.executable, "-P", script, "-q", "-p", "no:cacheprovider", f"--rootdir={tmp_path}", tmp_path]
    done = forks.run(command, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr


@each
def test_commands_are_understood(document: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every `prunekit ...` is one the command line takes, down to names, options and values; none does its work."""
    monkeypatch.chdir(tmp_path)
    for name in ("my.jsonl", "my.txt", "questions.jsonl"):
        Path(name).touch()
    Path("my.yaml").write_text("pruner: {name: obs}\n")
    for recipe in ("half/recipe.yaml", "family/0.3/recipe.yaml", "study/best.yaml"):
        Path(recipe).parent.mkdir(parents=True)
        Path(recipe).write_text("model: some/model\n")
    side = {"parameters": 100, "block_parameters": 80}
    report = {"dense": side, "pruned": side, "losses": {"dense": {"perplexity": 9.0}, "pruned": {"perplexity": 9.0}}}
    monkeypatch.setattr(workplace, "check_output", lambda *_, **__: None)  # results of earlier commands are there
    monkeypatch.setattr(pruning, "prune", lambda *_, **__: SimpleNamespace(report=report))
    curve = {"dense": report["losses"]["dense"] | side, "members": [], "token_forwards": 0, "seconds": 0.0}
    monkeypatch.setattr(family, "family", lambda *_, **__: SimpleNamespace(document=curve))
    known: Any = get_command(app)
    for command, *arguments in commands(document, "prunekit"):
        assert command in known.commands
        if command == "prune" and arguments:
            done = CliRunner().invoke(app, [command, *arguments])
            assert done.exit_code == 0, f"{shlex.join(arguments)}: {done.stderr}"
        elif arguments:
            known.commands[command].make_context(command, arguments)


@each
def test_make_targets_exist(document: Path) -> None:
    targets = set(TARGET.findall((ROOT / "Makefile").read_text()))
    assert {words[0] for words in commands(document, "make")} <= targets


@each
def test_scripts_exist(document: Path) -> None:
    scripts = [words[0] for words in commands(document, "python") if words[0].endswith(".py")]
    assert not [script for script in scripts if not (ROOT / script).is_file()]


@each
def test_extras_exist(document: Path) -> None:
    known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    asked = re.findall(r"(?:\.|prunekit)\[([\w,]+)\]", document.read_text(encoding="utf-8"))
    assert {extra for extras in asked for extra in extras.split(",")} <= set(known)


def test_the_readme_names_every_plugin_of_ours() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    names = {name for registry in KINDS for name, entry in registry.items() if entry.owner == "prunekit"}
    assert not {name for name in names if f"`{name}`" not in text}
