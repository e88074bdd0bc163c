"""What a stranger gets: build sdist and wheel, install them in a clean environment, add a third-party plug-in.

The environment borrows torch and the other dependencies from the one that runs this file; prunekit
and the plug-in come from their wheels, and every command runs outside the checkout.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = {"prunekit", "prunekit_strategies", "prunekit_objectives"}
DATA = {f"{package}/py.typed" for package in PACKAGES}
DATA |= {f"prunekit/demo/model/{name}" for name in ("config.json", "model.safetensors", "tokenizer.json")}
DATA |= {str(path.relative_to(ROOT / "strategies")) for path in ROOT.glob("strategies/*/*/*.yaml")}
PLUGINS = {
    "leave-one-out": "pruner",
    "loudest": "signal",
    "tails": "signal",
    "descent": "allocator",
    "one-look": "learner",
    "worst-site": "objective",
    "volume": "finisher",
    "weighted-parameters": "metric",
    "table": "exporter",
}
OWNER = "prunekit-corner"
CHECKS = """
import gc, os, sys
import prunekit.testing
from prunekit.cli.main import app
gc.freeze()
for name in sys.argv[1:]:
    print(f"prunekit check {name}:", flush=True)
    if not os.fork():
        sys.exit(app(["check", name]))
    if os.wait()[1]:
        sys.exit(1)
"""  # each in a copy of one process, because to import torch and transformers takes longer than any of them


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="prunekit-wheel-") as scratch:
        wheel = built(Path(scratch, "dist"))
        check_content(wheel)
        clean = Environment(Path(scratch, "clean"))
        clean.install(wheel)
        check_core(clean)
        plugin = shutil.copytree(ROOT / "tests/plugin", Path(scratch, "plugin"))
        clean.install(plugin)
        check_plugin(clean, plugin)
        check_new(clean, Path(scratch, "new"))
    print("the wheel is what was promised")


def built(folder: Path) -> Path:
    """The wheel, built from the sdist by the hatchling of this environment."""
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, ROOT)
    (wheel,) = folder.glob("*.whl")
    return wheel


def check_content(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    top = {name.split("/")[0] for name in names if ".dist-info/" not in name}
    assert top == PACKAGES, f"top level is {sorted(top)}"
    assert names >= DATA, f"{sorted(DATA - names)} are not in {wheel.name}"
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)
    print(f"{wheel.name}: {len(names)} files, {wheel.stat().st_size / 1e6:.1f} MB")


class Environment:
    """A virtual environment that sees the dependencies of this one, after its own packages."""

    def __init__(self, folder: Path) -> None:
        run(sys.executable, "-m", "venv", "--without-pip", folder)
        self.folder, self.python = folder, folder / "bin/python"
        self.packages = Path(sysconfig.get_path("purelib", "venv", {"base": str(folder)}))
        (self.packages / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")

    def install(self, what: Path) -> None:
        pip = (sys.executable, "-m", "pip", "--python", self.python, "--quiet", "--disable-pip-version-check")
        # what is borrowed is not to be touched: nothing is uninstalled, nothing fetched
        run(*pip, "install", "--no-deps", "--no-index", "--no-build-isolation", "--ignore-installed", what)

    def __call__(self, *command: object) -> str:
        """Run a command of this environment, away from every checkout."""
        program, *arguments = command
        return run(self.folder / "bin" / str(program), *arguments, cwd=self.folder)


def check_core(clean: Environment) -> None:
    for package in sorted(PACKAGES):
        found = Path(clean("python", "-c", f"import {package}; print({package}.__file__)").strip())
        assert found.is_relative_to(clean.packages.resolve()), f"{package} comes from {found}"
    owners = {row["owner"] for row in json.loads(clean("prunekit", "list", "--json"))}
    assert owners == {"prunekit"}, f"owners are {owners}"
    model = clean.packages / "prunekit/demo/model"
    few = ("--dataset", "python-docs", "--seqlen", 64, "--tokens", 1024, "--json", "--quiet")
    perplexity = json.loads(clean("prunekit", "evaluate", model, *few))["perplexity"]
    assert 1 < perplexity < 200, f"perplexity of the bundled model is {perplexity}"


def check_plugin(clean: Environment, plugin: Path) -> None:
    rows = json.loads(clean("prunekit", "list", "--json"))
    owned = {row["name"]: row["kind"] for row in rows if row["owner"] == OWNER}
    assert owned == PLUGINS, f"{OWNER} owns {owned}"
    # a learner says in its own suite how far from the optimum it may end, which `prunekit check` cannot know
    first, *others = (name for name, kind in PLUGINS.items() if kind != "learner")
    print(clean("prunekit", "check", first), clean("python", "-c", CHECKS, *others))
    quiet = ("-q", "-p", "no:cacheprovider", "--import-mode=importlib")
    print(f"{OWNER}: {clean('python', '-m', 'pytest', *quiet, plugin).splitlines()[-1]}")


def check_new(clean: Environment, folder: Path) -> None:
    """What `prunekit new` writes installs, is listed and passes its suite."""
    clean("prunekit", "new", "quite-new", "--kind", "pruner", "--output", folder)
    clean.install(folder)
    assert clean("prunekit", "list", "quite-new").startswith("pruner quite-new, of prunekit-quite-new\n")
    quiet = ("-q", "-p", "no:cacheprovider", "--import-mode=importlib")
    print(f"prunekit-quite-new: {clean('python', '-m', 'pytest', *quiet, folder).splitlines()[-1]}")


def run(*command: object, cwd: Path | None = None) -> str:
    """Standard output; what a failing command said is shown."""
    env = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run(
        list(map(str, command)), cwd=cwd, env=env | {"HF_HUB_OFFLINE": "1"}, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}")
    return done.stdout


if __name__ == "__main__":
    main()
