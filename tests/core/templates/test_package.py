"""`prunekit new` writes packages that are found, pass their suites and take part in a comparison; never over a file."""

import ast
import json
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

import prunekit
from prunekit.cli.main import app
from prunekit.errors import WrongInput
from prunekit.plugins.registry import KINDS, Registry
from prunekit.recipe.suite import Suite
from prunekit.run import compare as comparing
from prunekit.run.session import Job
from prunekit.templates.package import USES, write_package

NAMES = {registry.kind: f"my-{registry.kind}" for registry in KINDS} | {"adapter": "gemma"}
LIGHT = ("pruner", "metric")
HEAVY = tuple(kind for kind in NAMES if kind not in LIGHT)
RUN = """
import sys, pytest
sys.path[:0] = sys.argv[1].split(":")
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", "-p", "no:randomly", "--import-mode=importlib", *sys.argv[2:]]))
"""


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, list(map(str, arguments)))


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A package of every kind, in folders named by it, each with what pip leaves of a distribution."""
    home = tmp_path_factory.mktemp("packages")
    for kind, name in NAMES.items():
        write_package(name, kind, home / kind)
        project = tomllib.loads((home / kind / "pyproject.toml").read_text("utf-8"))["project"]
        info = home / kind / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: 0.1.0\n")
        groups = project["entry-points"].items()
        lines = (
            line for group, points in groups for line in (f"[{group}]", *(f"{k} = {v}" for k, v in points.items()))
        )
        (info / "entry_points.txt").write_text("\n".join(lines))
    return home


@pytest.fixture
def installed(written: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """All of them, known to the registry."""
    for kind in NAMES:
        monkeypatch.syspath_prepend(written / kind)
    for registry in KINDS:
        fresh: Registry[object] = Registry(registry.kind, registry._contract)
        monkeypatch.setitem(vars(registry), "_entries", fresh._entries)
    yield
    for name in NAMES.values():
        sys.modules.pop(f"prunekit_{name.replace('-', '_')}", None)


def test_every_kind_of_the_registry_has_a_template_and_a_use() -> None:
    assert set(NAMES) == set(USES) == {registry.kind for registry in KINDS}


@pytest.mark.parametrize("kind", NAMES)
def test_nothing_of_the_template_is_left(kind: str, written: Path) -> None:
    for file in (written / kind).glob("*.*"):
        if file.is_file():
            assert "emplate" not in file.read_text("utf-8"), file
    for file in (written / kind).glob("*.py"):
        ast.parse(file.read_text("utf-8"))


def test_all_are_listed_with_their_owner_and_first_line(installed: None) -> None:
    lines = [line.split(maxsplit=1) for line in run("list").stdout.splitlines() if line.startswith("  ")]
    said = dict(lines)
    for registry in KINDS:
        name = NAMES[registry.kind]
        assert said[name].startswith(f"[of prunekit-{name}] ")
        assert registry[name].load().__module__ == f"prunekit_{name.replace('-', '_')}"


@pytest.mark.slow  # `make wheel` writes a pruner and runs its suite
@pytest.mark.parametrize("kinds", [LIGHT, HEAVY], ids=["light", "heavy"])
def test_their_suites_pass(kinds: tuple[str, ...], written: Path, tmp_path: Path, forks: Any) -> None:
    """In one process, which has all of them on its path."""
    script = tmp_path / "run.py"
    script.write_text(RUN)
    folders = [str(written / kind) for kind in kinds]
    command = [sys.executable, "-P", script, ":".join(folders), f"--rootdir={written}", *folders]
    done = forks.run(command, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout


@pytest.mark.slow
def test_all_take_part_in_a_comparison(installed: None, saved_tiny: Callable[..., Path], tmp_path: Path) -> None:
    """The command line names pruner, allocator, learner, objective, metric and engine; a suite names the other two."""
    few = ("calibration_tokens=512", "search_tokens=256", "evaluation_tokens=4096", "seqlen=32")
    data = [word for key in few for word in ("--set", f"data.{key}")]
    suite = tmp_path / "suite.yaml"
    suite.write_text(
        "recipe: fast\ncells:\n  finished: {finishers: [my-finisher]}\n"
        "  signalled: {allocator: {name: metric-map, signal: my-signal}}\n"
    )
    done = run(
        "compare", saved_tiny(), suite, "--pruners", "my-pruner", "--allocators", "my-allocator", "--learners",
        "my-learner", "--objectives", "my-objective", "--set", "metric=my-metric", "--engine", "my-engine", *data,
        "--dataset", "python-docs", "--output", tmp_path / "out", "--quiet", "--json",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    rows = [json.loads(line) for line in (tmp_path / "out/rows.jsonl").read_text().splitlines()]
    cells = {
        "finished",
        "signalled",
        "my-pruner + my-allocator + my-objective",
        "my-pruner + my-learner + my-objective",
    }
    assert {row["cell"]: row["state"] for row in rows if row["cell"] in cells} == dict.fromkeys(cells, "complete")


def test_rows_of_code_that_was_changed_since_are_not_gone_on_with(
    installed: None, written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def opened(*_: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(comparing, "open_bench", opened)  # a comparison that is stopped as it begins
    suite = Suite.of_mapping({"models": ["m"], "pruners": ["my-pruner"], "recipe": "fast"})
    job, code = Job(output=tmp_path / "out"), written / "pruner/prunekit_my_pruner.py"
    before = code.read_text("utf-8")
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            comparing.compare(suite, job)
    (written / "signal/prunekit_my_signal.py").touch()  # of a package that no cell names
    try:
        code.write_text(before + "\n# another formula\n", encoding="utf-8")
        with pytest.raises(WrongInput, match=r"another code of plug-ins.*discard it with --overwrite"):
            comparing.compare(suite, job)
        with pytest.raises(KeyboardInterrupt):
            comparing.compare(suite, Job(output=job.output, overwrite=True))
    finally:
        code.write_text(before, encoding="utf-8")


@pytest.mark.parametrize("command", ["prune", "tune"])
def test_nor_are_runs_and_studies(
    command: str, installed: None, written: Path, saved_tiny: Callable[..., Path], tmp_path: Path, killed_at: Any
) -> None:
    if command == "tune":
        pytest.importorskip("optuna")
    from prunekit.run import prune as pruning
    from prunekit.run.bench import Bench

    text = tmp_path / "text.txt"
    text.write_text("a few words of text, " * 2000)
    asked: dict[str, Any] = {"recipe": "fast", "allocator": "uniform", "quiet": True, "output": tmp_path / "out"}
    asked |= {f"data__{part}_tokens": 64 for part in ("calibration", "search", "evaluation")}
    asked |= {"model": saved_tiny(), "data__dataset": str(text), "data__seqlen": 16}
    if command == "tune":  # where the space alone names it
        asked |= {"space": {"pruner": ["obs", "my-pruner"]}, "trials": 1}
    else:
        asked["pruner"] = "my-pruner"
    call, code = getattr(prunekit, command), written / "pruner/prunekit_my_pruner.py"
    before = code.read_text("utf-8")

    def killed() -> None:
        with killed_at(*((Bench, "make") if command == "tune" else (pruning, "run_search")), 1):
            call(**asked)

    killed()
    killed()  # the same code goes on
    try:
        code.write_text(before + "\n# another formula\n", encoding="utf-8")
        with pytest.raises(WrongInput, match=r"\(another code of plug-ins\); go on .* discard it with --overwrite"):
            call(**asked)
        asked["overwrite"] = True
        killed()
    finally:
        code.write_text(before, encoding="utf-8")


@pytest.mark.slow
def test_pip_installs_it_and_it_is_listed(tmp_path: Path) -> None:
    write_package("my-pruner", "pruner", tmp_path / "mine")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--no-build-isolation"]
    subprocess.run([*pip, "--target", tmp_path / "site", tmp_path / "mine"], check=True, capture_output=True)
    listed = f"import sys; sys.path.insert(0, {str(tmp_path / 'site')!r}); from prunekit.cli.main import app; app()"
    done = subprocess.run(
        [sys.executable, "-c", listed, "list", "my-pruner"], capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("pruner my-pruner, of prunekit-my-pruner\n")


# -- what is refused --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("obs", "--kind", "pruner"), "prunekit has a pruner 'obs' already"),
        (("obz", "--kind", "pruners"), "no kind of plug-in 'pruners'; did you mean 'pruner'?"),
        (("obz",), "no --kind was given; there are pruner, "),
        (("Mine", "--kind", "pruner"), "'Mine' is no name for a plug-in"),
        (("1st", "--kind", "pruner"), "'1st' is no name for a plug-in"),
        (("a b", "--kind", "pruner"), "'a b' is no name"),
        (("a--b", "--kind", "pruner"), "'a--b' is no name"),
        (("../out", "--kind", "pruner"), "'../out' is no name"),
        (("é", "--kind", "pruner"), "'é' is no name"),
        (("a" * 61, "--kind", "pruner"), "is no name"),
        (("strategies", "--kind", "pruner"), "would hide the package prunekit_strategies"),
        (("lama", "--kind", "adapter"), "transformers has no model_type 'lama'; did you mean"),
        (("mine", "--kind", "pruner", "-o", "gone/mine"), "there is no folder gone for mine"),
    ],
)
def test_what_cannot_be_is_one_sentence_and_nothing_is_written(
    arguments: tuple[str, ...], sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = run("new", *arguments)
    assert (done.exit_code, done.stderr.count("\n")) == (2, 1)
    assert sentence in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("there", ["folder", "file", "link"])
def test_nothing_is_written_over(there: str, tmp_path: Path) -> None:
    place = tmp_path / "mine"
    if there == "folder":
        place.mkdir()
    elif there == "file":
        place.write_text("mine")
    else:
        place.symlink_to("nowhere")
    with pytest.raises(WrongInput, match="exists; name a new folder"):
        write_package("mine", "pruner", place)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_a_name_that_python_or_the_code_uses_gets_the_kind_behind_it(tmp_path: Path) -> None:
    for name, kind, cls in [
        ("none", "pruner", "NonePruner"),
        ("path", "exporter", "PathExporter"),
        ("pruner-suite", "pruner", "PrunerSuitePruner"),
        ("my_own-2nd", "pruner", "MyOwn2nd"),
    ]:
        made = write_package(name, kind, tmp_path / name)
        code = (made.folder / f"prunekit_{name.replace('-', '_')}.py").read_text("utf-8")
        assert f"\nclass {cls}(pk." in code
        assert f'{name} = "prunekit_' in (made.folder / "pyproject.toml").read_text("utf-8")


def test_the_command_says_what_to_do_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    done = run("new", "mine", "--kind", "allocator")
    assert done.exit_code == 0
    assert "prunekit-mine/prunekit_mine.py" in done.stdout.splitlines()
    assert "pip install -e prunekit-mine" in done.stdout
    assert "prunekit compare MODEL --recipes default --allocators mine " in done.stdout
