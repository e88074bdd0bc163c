"""`prunekit doctor` says what there is, what is missing with the command that installs it, and what is broken."""

import json
import shutil
from importlib import metadata
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.requirements import Requirement
from typer.testing import CliRunner, Result

from prunekit.cli.main import app
from prunekit.plugins.registry import KINDS, PRUNERS, Entry
from prunekit.run import doctor


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["doctor", *arguments])


@pytest.fixture(autouse=True)
def entries(monkeypatch: pytest.MonkeyPatch) -> dict[str, Entry]:
    """Few plug-ins, and a measurement that has been made."""
    kept = {"uniform", "hf", "magnitude"}
    for registry in KINDS:
        own = {name: entry for name, entry in registry.items() if name in kept}
        monkeypatch.setitem(vars(registry), "_entries", own)
    monkeypatch.setattr("prunekit.models.opening.times_as_fast", lambda *_: 0.62)
    return vars(PRUNERS)["_entries"]


def test_it_says_what_pip_and_the_system_say() -> None:
    done = run("--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["sound"] is True
    assert found["packages"]["torch"] == metadata.version("torch")
    assert found["plugins"] == {"prunekit": 3}
    assert found["threads"]["torch"] == torch.get_num_threads()
    assert {each["what"] for each in found["disk"]} == {"folder", "cache"}
    assert found["disk"][0]["total"] == shutil.disk_usage(Path()).total
    assert 0 < found["memory"]["free"] <= found["memory"]["total"]
    assert len(found["devices"]) == torch.cuda.device_count()
    (engine,) = (each for each in found["engines"] if each["formats"] == ["hf"])
    assert engine["found"] == f"transformers {metadata.version('transformers')}"


def test_an_engine_that_is_not_here_is_said_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    exporter: Any = doctor.EXPORTERS["hf"].load()
    monkeypatch.setattr(exporter, "modules", ("no_such_module",))
    monkeypatch.setattr(exporter, "install", "prunekit[imagined]")
    line = next(line for line in run().stdout.splitlines() if line.startswith("engine transformers"))
    assert line.endswith('not installed: pip install "prunekit[imagined]" (formats hf)')


@pytest.mark.parametrize(("ratio", "dtype"), [(0.62, "float32"), (5.8, "bfloat16")])
def test_the_dtype_is_that_of_the_measurement_behind_auto(
    ratio: float, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("prunekit.models.opening.times_as_fast", lambda *_: ratio)
    cpu = doctor.examine(Path()).cpu
    assert (cpu["dtype_auto"], cpu["bfloat16_times_as_fast"]) == (dtype, ratio)
    assert f"{dtype} of a bfloat16 checkpoint: a product in bfloat16 is {ratio} times" in run().stdout


def test_a_broken_plugin_is_listed_and_the_exit_code_is_one(entries: dict[str, Entry]) -> None:
    entries["gone"] = Entry("pruner", "gone", "their-package", EntryPoint("gone", "nowhere:Gone", "prunekit.pruners"))
    said, found = run(), run("--json")
    assert (said.exit_code, found.exit_code) == (1, 1)
    lines = said.stdout.splitlines()
    assert any(line.startswith("broken ") and "pruner 'gone' of their-package is broken" in line for line in lines)
    (broken,) = json.loads(found.stdout)["broken"]
    assert (broken["kind"], broken["name"], broken["owner"]) == ("pruner", "gone", "their-package")
    assert "nothing is broken" not in lines


def test_what_a_plugin_prints_does_not_reach_json(
    entries: dict[str, Entry], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "chatty.py").write_text("print('hello')\nimport not_there\n")
    monkeypatch.syspath_prepend(tmp_path)
    entries["chatty"] = Entry("pruner", "chatty", "theirs", EntryPoint("chatty", "chatty:X", "prunekit.pruners"))
    done = run("--json")
    assert done.exit_code == 0  # what is not installed is not broken
    (needs,) = json.loads(done.stdout)["needs"]
    assert "needs 'not_there', which is not installed: pip install not_there" in needs["error"]


def test_what_an_extra_lacks_is_said_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = ["torch>=2", "torch>=999; extra == 'new'", "no-such-package>=3; extra == 'other'", "typer; extra == 'all'"]
    wanted += ["prunekit[other]; extra == 'both'", "torch; extra == 'both'", "x; extra == 'x' and sys_platform == 'no'"]
    monkeypatch.setattr(doctor.metadata, "requires", lambda _: wanted)
    extras = {each.name: each for each in doctor._extras()}
    assert extras["new"].missing == (f"torch>=999, not {metadata.version('torch')}",)
    assert extras["other"].missing == extras["both"].missing == ("no-such-package>=3",)
    assert extras["both"].install == 'pip install "prunekit[both]"'
    assert extras["x"].missing == ()
    assert "all" not in extras
    assert list(doctor._unmet()) == []


def test_a_requirement_that_is_not_met_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.metadata, "requires", lambda _: ["torch>=999"])
    done = run()
    assert done.exit_code == 1
    assert 'install it: pip install "torch>=999"' in done.stdout


def test_a_torch_that_cannot_be_imported_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails() -> Any:
        raise ImportError("libcudart.so: cannot open shared object file")

    monkeypatch.setattr(doctor, "_hardware", fails)
    done = run()
    assert done.exit_code == 1
    assert "torch cannot be imported (ImportError: libcudart.so" in done.stdout


def test_every_extra_of_ours_is_known() -> None:
    known = {each.name for each in doctor._extras()}
    assert {"optuna", "onnx", "llama-cpp", "testing"} <= known
    assert not known & set(doctor.SUMS)
    assert all(isinstance(each, Requirement) for each in doctor._requirements()[""])
