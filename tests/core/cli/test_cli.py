import errno
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from transformers import LlamaForCausalLM
from typer.main import get_command
from typer.testing import CliRunner, Result

from prunekit.cli.main import app
from prunekit.cli.options import Work
from prunekit.cli.tables import comparison, print_table
from prunekit.recipe.resolve import resolve
from prunekit.recipe.schema import Recipe
from prunekit.run import prune as pruning
from prunekit.run import session
from prunekit.run.session import Job
from prunekit.testing import PrunerSuite
from prunekit_strategies.pruners.obs import OBS


@pytest.fixture(scope="module")
def model(saved_letters: Callable[..., Path]) -> Path:
    return saved_letters()


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("data") / "prose.txt"
    file.write_text("the quick brown fox jumps over the lazy dog. " * 60)
    return file


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def refused(*arguments: object) -> str:
    """The sentence a wrong command ends in."""
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    sentence = result.stderr.strip().splitlines()[-1]
    assert sentence.startswith("error: ")
    return sentence


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What the command line asked of the pruning, which is not run."""
    calls: list[Any] = []
    side = {"parameters": 100, "block_parameters": 80}
    report = {"dense": side, "pruned": side, "losses": {k: {"perplexity": 9.0} for k in ("dense", "pruned")}}

    def prune(recipe: Recipe, job: Job) -> Any:
        calls.append((recipe, job))
        return SimpleNamespace(report=report, directory=job.output)

    monkeypatch.setattr(pruning, "prune", prune)
    return calls


# -- prune --------------------------------------------------------------------------------------------


def test_prune_needs_no_more_than_model_and_output(asked: list[Any]) -> None:
    result = run("prune", "some/model", "--output", "out")
    assert result.exit_code == 0, result.output
    recipe, job = asked[0]
    assert resolve(recipe).recipe == resolve(Recipe.load().with_overrides({"model": "some/model"})).recipe
    assert (job.output, job.resume, job.overwrite) == (Path("out"), True, False)


def test_every_flag_has_its_place_in_the_recipe(asked: list[Any]) -> None:
    flags = """--model m -o out --recipe fast --sparsity 0.3 --pruner magnitude --allocator uniform
        --objective perplexity --carry dense --structure groups --dataset python-docs --calibration-tokens 64
        --search-tokens 32 --seqlen 8 --seed 7 --device cpu --dtype float64 --set pruner.refit=true
        --finisher least-squares --finisher bias --set data.evaluation_tokens=16 --set finishers.bias.inputs=pruned
        --memory 3GiB --no-resume --overwrite --quiet"""
    result = run("prune", *flags.split())
    assert result.exit_code == 0, result.output
    recipe, job = asked[0]
    assert recipe.pruner.items() >= {"name": "magnitude", "refit": True}.items()
    assert (recipe.allocator["name"], recipe.objective["name"]) == ("uniform", "perplexity")
    assert [spec["name"] for spec in recipe.finishers] == ["least-squares", "bias"]
    assert recipe.finishers[1]["inputs"] == "pruned"
    assert (recipe.model, recipe.sparsity, recipe.carry, recipe.seed) == ("m", 0.3, "dense", 7)
    assert (recipe.device, recipe.dtype, recipe.data.dataset) == ("cpu", "float64", "python-docs")
    assert recipe.memory == "3GiB"
    data = recipe.data
    assert (data.calibration_tokens, data.search_tokens, data.evaluation_tokens, data.seqlen) == (64, 32, 16, 8)
    assert (job.resume, job.overwrite) == (False, True)


def test_a_target_is_given_in_place_of_sparsity(asked: list[Any]) -> None:
    assert run("prune", "m", "-o", "out", "--target", "latency=0.6", "--set", "latency.batch=2").exit_code == 0
    recipe = asked[0][0]
    assert (recipe.metric, recipe.sparsity, recipe.latency.batch) == ("latency", 0.4, 2)
    both = refused("prune", "m", "-o", "out", "--target", "latency=0.6", "--sparsity", "0.5")
    assert "sparsity cannot be given too" in both
    assert "more than 0 and less than 1" in refused("prune", "m", "-o", "out", "--target", "latency=60")
    assert "no metric 'speed'; there are bytes, flops" in refused("prune", "m", "-o", "out", "--target", "speed=0.6")


def test_what_was_promised_of_the_time_stands_below_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    side = {"parameters": 100, "block_parameters": 80}
    pace = {
        "workload": {"batch": 1, "prompt": 256, "new_tokens": 0},
        "target": 0.6, "promised": 0.59, "realised": 0.65, "miss": 0.65 / 0.59 - 1, "kept": False,
        "milliseconds": {"dense": 20.0, "pruned": 13.0}, "noise": {"table": 0.01, "result": 0.02},
    }  # fmt: skip
    losses = {k: {"perplexity": 9.0} for k in ("dense", "pruned")}
    report = {"dense": side, "pruned": side, "losses": losses, "latency": pace}
    report |= {"budget": {"metric": "latency"}}
    monkeypatch.setattr(pruning, "prune", lambda *_: SimpleNamespace(report=report))
    said = run("prune", "m", "-o", "out", "--target", "latency=0.6").stdout
    assert re.search(r"milliseconds +20 +13 +0\.650", said)
    assert "0.590 of the dense model's time was promised (0.6 asked), 0.650 was measured, +10.2%" in said
    assert "The promise is not kept" in said


@pytest.mark.parametrize("given", [("--dataset", "TEXT", "--dataset", "c4"), ("--dataset", "TEXT,c4")])
def test_several_data_sets_are_given_one_by_one_or_by_comma(
    asked: list[Any], text: Path, given: tuple[str, ...]
) -> None:
    assert run("prune", "m", "-o", "out", *(word.replace("TEXT", str(text)) for word in given)).exit_code == 0
    assert asked[0][0].data.names == [str(text), "c4"]


def test_a_file_may_have_a_comma_in_its_name(asked: list[Any], text: Path, tmp_path: Path) -> None:
    shutil.copy(text, tmp_path / "a,b.txt")
    assert run("prune", "m", "-o", "out", "--dataset", "a,b.txt").exit_code == 0
    assert asked[0][0].data.dataset == "a,b.txt"


def test_a_recipe_can_name_the_model(asked: list[Any], tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("model: some/model\n")
    assert run("prune", "--recipe", "mine.yaml", "-o", "out").exit_code == 0
    assert asked[0][0].model == "some/model"


@pytest.fixture
def few(model: Path, text: Path, tmp_path: Path) -> list[str]:
    """Options of a run of a moment."""
    flags = [str(model), "-o", str(tmp_path / "out"), "--pruner", "magnitude", "--dataset", str(text), "--seqlen", "8"]
    flags += ["--calibration-tokens", "64", "--search-tokens", "64", "--allocator", "uniform"]
    return [*flags, "--set", "data.evaluation_tokens=64", "--set", "verify=false", "--objective", "perplexity"]


def test_what_a_run_takes_is_said_before_it_begins(few: list[str]) -> None:
    said = run("prune", *few).stderr.splitlines()
    (line,) = [number for number, each in enumerate(said) if re.match(r"this takes [\d.]+ s, ", each)]
    assert re.search(r"of memory and .* of disk; `prunekit plan` with the same options says where$", said[line])
    assert line < min(number for number, each in enumerate(said) if each.startswith("prune 1 "))
    assert "--recipe fast" not in "".join(said)
    assert "this takes" not in run("prune", *few, "--overwrite", "--quiet").stderr


@pytest.mark.slow
def test_of_a_long_run_what_takes_less_is_said(few: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "LONG", 0.0)
    assert "--recipe fast" not in run("prune", *few).stderr  # it would take longer than this one
    settings = ("pruner.name=obs", "allocator.name=evolution", "objective.name=divergence")
    many = [*few, *(part for each in settings for part in ("--set", each)), "--search-tokens", "1024", "--overwrite"]
    said = run("prune", *many).stderr
    shorter = r"with --recipe fast --calibration-tokens \d+ in the place of .* takes [\d.]+ s; ctrl-c stops"
    assert re.search(shorter, said)
    pattern = ["--structure", "2:4", "--pruner", "sparsegpt"]  # which the pruner of the shorter recipe does not know
    assert run("prune", *few, *pattern, "--overwrite").exit_code == 0


@pytest.mark.parametrize(
    ("effort", "recipe"), [("quick", "fast"), ("standard", "default"), ("thorough", "default-recover")]
)
def test_an_effort_is_a_recipe(asked: list[Any], effort: str, recipe: str) -> None:
    assert run("prune", "m", "-o", "out", "--effort", effort).exit_code == 0
    assert asked[0][0] == Recipe.load(recipe).with_overrides({"model": "m"})


def test_an_effort_that_is_none_or_beside_a_recipe_is_refused(asked: list[Any]) -> None:
    assert "no effort 'slow'; there are quick, standard, thorough" in run("prune", "m", "--effort", "slow").stderr
    both = run("prune", "m", "-o", "out", "--effort", "quick", "--recipe", "fast")
    assert both.exit_code == 2
    assert "both a recipe, 'fast', and an effort, 'quick', were given" in both.stderr
    assert not asked


# -- plan ---------------------------------------------------------------------------------------------


def test_plan_has_every_option_of_prune_and_says_what_it_would_take(model: Path, asked: list[Any]) -> None:
    flags = f"{model} -o out --recipe fast --pruner magnitude --calibration-tokens 64 --seqlen 8 --sparsity 0.3 --quiet"
    result = run("plan", *flags.split())
    assert result.exit_code == 0, result.output
    lines = [line.split() for line in result.stdout.splitlines()]
    assert {"open", "prune", "search", "rebuild", "evaluate", "export", "in"} <= {line[0] for line in lines}
    assert "magnitude itself" not in result.stdout  # the pruner was tried
    assert "at least" not in result.stdout
    assert "opened whole" in result.stdout
    told = json.loads(run("plan", *flags.split(), "--json").stdout)
    names = ["open", "fisher", "prune 1", "search 1", "rebuild", "dense model", "evaluate", "export"]
    assert [stage["name"] for stage in told["stages"]] == names
    assert told["rates"]["flops"] > 0
    assert not asked
    assert not Path("out").exists()


@pytest.mark.slow
def test_plan_counts_families_and_targets(model: Path) -> None:
    flags = f"{model} --recipe fast --pruner magnitude --calibration-tokens 64 --seqlen 8".split()
    said = run("plan", *flags, "--sparsity", "0.2,0.4").stdout
    for name in ("search 1 for 0.2", "export for 0.2", "export for 0.4", "0.2 alone", "0.4 alone"):
        assert name in said
    told = json.loads(run("plan", *flags, "--target", "parameters=0.8,0.6", "--json").stdout)
    assert [row["sparsity"] for row in told["members"]] == [0.2, 0.4]
    assert told["members"][0]["disk"] > told["members"][1]["disk"] > 0
    said = run("plan", *flags, "--target", "latency=0.6").stdout
    assert re.search(r"time sub-layers .* at least|more rounds, as long as 120 s are not over", said)
    assert "sparsity 0.2 is given twice" in refused("plan", *flags, "--sparsity", "0.2,0.2")


def test_a_full_disk_is_one_sentence_whoever_met_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for error in (
        OSError(errno.ENOSPC, "No space left on device"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ):

        def full(*_: object, error: Exception = error, **__: object) -> None:
            raise error

        monkeypatch.setattr(pruning, "prune", full)
        result = run("prune", "m", "-o", "out")
        assert (result.exit_code, result.stderr.count("\n")) == (1, 1)
        assert "the disk is full; make room, and the same command continues" in result.stderr


def test_plan_and_prune_refuse_what_cannot_fit(model: Path) -> None:
    assert "takes at least" in refused("prune", model, "-o", "out", "--memory", "1MB")
    result = run("plan", model, "--memory", "1MB")
    assert result.exit_code == 2
    assert "takes at least" in result.stderr
    assert "evaluate" in result.stdout  # the table all the same
    assert "no amount of memory 'much'" in refused("prune", model, "-o", "out", "--memory", "much")


def test_an_interrupted_run_says_how_to_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(pruning, "prune", interrupted)
    result = run("prune", "m", "-o", "out")
    assert result.exit_code == 130
    assert "the same command continues from here" in result.stderr


def test_what_ends_the_process_from_within_is_no_success(monkeypatch: pytest.MonkeyPatch) -> None:
    def ended(*_: object, **__: object) -> None:
        raise SystemExit(0)

    monkeypatch.setattr(pruning, "prune", ended)
    result = run("prune", "m", "-o", "out")
    assert result.exit_code == 1
    assert "error: something that was called would end the process (SystemExit: 0)" in result.stderr


def test_a_reader_that_has_seen_enough_is_no_error() -> None:
    command = [sys.executable, "-m", "prunekit.cli", "list", "--help"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""


def test_prune_then_evaluate(model: Path, text: Path, tmp_path: Path) -> None:
    small = (
        "--calibration-tokens 256 --search-tokens 128 --seqlen 16 --set data.evaluation_tokens=256 --set verify=false"
    )
    parts = "--pruner obs --allocator uniform --objective expected-error --quiet"
    result = run("prune", model, "-o", tmp_path / "out", "--dataset", text, *small.split(), *parts.split())
    assert result.exit_code == 0, result.output + result.stderr
    assert "block parameters" in result.stdout
    assert result.stderr == ""
    again = refused("prune", model, "-o", tmp_path / "out", "--dataset", text, *small.split(), *parts.split())
    assert "is not empty" in again

    result = run("evaluate", tmp_path / "out", "--dataset", text, "--seqlen", 16, "--tokens", 256, "--json", "--quiet")
    assert result.exit_code == 0, result.output + result.stderr
    found = json.loads(result.stdout)
    assert found["label"] == "ppl/prose/seq16/n16/float32"
    assert found["parameters"] == json.loads((tmp_path / "out/report.json").read_text())["pruned"]["parameters"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("-o", "out"), "no model was given"),
        (("MODEL",), "no --output was given"),
        (("MODEL", "--model", "other", "-o", "out"), "two models were given"),
        (("MODEL", "-o", "out", "--sparsity", "1.5"), "more than 0 and less than 1, not 1.5"),
        (("MODEL", "-o", "out", "--sparsity", "0"), "more than 0 and less than 1, not 0"),
        (("MODEL", "-o", "out", "--sparsity", "half"), "'half' is no number between 0 and 1, nor several by comma"),
        (("MODEL", "-o", "out", "--sparsty", "0.5"), "No such option: --sparsty"),
        (("MODEL", "-o", "TEXT"), "is a file; choose another --output"),
        (("MODEL", "-o", "TEXT/below"), "cannot be made"),
        (("TEXT", "-o", "out"), "is a file; give the folder that it is in"),
        (("MODEL", "-o", "out", "--pruner", "obz"), "did you mean 'obs'?"),
        (("MODEL", "-o", "out", "--allocator", "tir"), "did you mean 'tyr'?"),
        (("MODEL", "-o", "out", "--objective", "divergense"), "did you mean 'divergence'?"),
        (("MODEL", "-o", "out", "--recipe", "tir"), "did you mean 'tyr'?"),
        (("MODEL", "-o", "out", "--recipe", "gone.yaml"), "no recipe file 'gone.yaml'"),
        (("MODEL", "-o", "out", "--carry", "none"), "carry is one of"),
        (
            ("MODEL", "-o", "out", "--structure", "rows"),
            "no structure 'rows'; there are groups, weights",
        ),
        (("MODEL", "-o", "out", "--dataset", "gone.txt"), "no file 'gone.txt'"),
        (("MODEL", "-o", "out", "--dataset", "wikitex2"), "did you mean 'wikitext2'?"),
        (("MODEL", "-o", "out", "--calibration-tokens", "0"), "data.calibration_tokens"),
        (("MODEL", "-o", "out", "--set", "pruner.aime=dense"), "did you mean 'aim'?"),
        (("MODEL", "-o", "out", "--set", "nothing"), "--set takes key.path=value"),
        (("MODEL", "-o", "out", "--dtype", "float12"), "dtype is one of"),
        (("MODEL", "-o", "out", "--device", "gpu"), "no device 'gpu'"),
        (("./gone", "-o", "out"), "no model folder './gone'"),
        (
            ("MODEL", "-o", "out", "--dataset", "TEXT", "--seqlen", "16", "--search-tokens", "9999999"),
            "too little text",
        ),
        (("MODEL", "-o", "out", "--dataset", "TEXT", "--seqlen", "128"), "longer than the model's 64 positions"),
        (("MODEL", "-o", "out", "--set", "of=model", "--sparsity", "0.99"), "cannot be met: reachable is 0 to"),
        (("MODEL", "-o", "FULL"), "is not empty"),
    ],
)
def test_wrong_input_is_one_sentence(
    model: Path, text: Path, tmp_path: Path, arguments: tuple[str, ...], sentence: str
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full/something").touch()
    places = {"MODEL": model, "TEXT": text, "TEXT/below": text / "below", "FULL": tmp_path / "full"}
    assert sentence in refused("prune", *(places.get(argument, argument) for argument in arguments), "--quiet")
    assert not (tmp_path / "out").exists()


def test_a_model_that_holds_nan_is_refused(model: Path, text: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(model, broken)
    loaded = LlamaForCausalLM.from_pretrained(broken)
    loaded.get_submodule("model.layers.1.mlp.down_proj").weight.data[3, 3] = torch.nan  # type: ignore[index]
    loaded.save_pretrained(broken)
    assert "layers.1.mlp.down_proj" in refused("prune", broken, "-o", "out", "--dataset", text, "--quiet")


def test_an_architecture_without_adapter_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bloom", "architectures": ["BloomForCausalLM"]}))
    assert "llama" in refused("prune", tmp_path, "-o", "out", "--quiet")


# -- evaluate, check, demo ----------------------------------------------------------------------------


def test_evaluate_warns_of_few_windows(model: Path, text: Path) -> None:
    result = run("evaluate", model, "--dataset", text, "--seqlen", 16, "--tokens", 64)
    assert result.exit_code == 0, result.output
    assert "only 4 windows" in result.stderr
    assert re.search(r"measured as +ppl/prose/seq16/n4/float32", result.stdout)


def test_evaluate_times_two_models_in_turns(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from prunekit.measure import speed

    drawn = iter([1, 2, 4, 3, 5, 9] * 1000)
    monkeypatch.setattr(speed, "timed", lambda net, work: (work.batch * work.prompt * 1000, next(drawn) * 10**8))
    shared = ("evaluate", model, "--dataset", text, "--seqlen", 16, "--tokens", 64, "--quiet", "--against", model)
    found = json.loads(run(*shared, "--json").stdout)
    assert found["against"]["model"] == str(model)
    assert found["prefill_tokens_per_second"] == found["against"]["prefill_tokens_per_second"] == pytest.approx(1e6)
    assert found["against"]["prefill_ratio_interval"] == [1, 1]
    assert not found["against"]["decode_ratio_clear"]
    low, high = found["decode_tokens_per_second_middle_half"]
    assert low < found["decode_tokens_per_second"] < high
    result = run(*shared)
    assert re.search(r"prefill +1,000,000.0 tokens/s, half of the rounds", result.stdout)
    assert re.search(r"decode, ratio +no difference beyond noise; ", result.stdout)
    assert re.search(rf"perplexity +[0-9.]+; {model} has", result.stdout)
    assert re.search(r"loss, rise +\+0.0000 ± 0.0000 nats per token", result.stdout)


def test_evaluate_asks_tasks(model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("lm_eval")
    from lm_eval.tasks import TaskManager  # its import is what takes time

    from prunekit.measure import speed

    assert TaskManager
    monkeypatch.setattr(speed, "timed", lambda net, work: (10**8, 10**8))
    rows = [{"prompt": "a cat sat on the", "choices": ["mat", "sky"], "answer": right} for right in (0, 1, 1)]
    (tmp_path / "cats.jsonl").write_text("\n".join(map(json.dumps, rows)))
    judged = ("evaluate", model, "--dataset", text, "--seqlen", 16, "--tokens", 64, "--harness", "cats")
    found = json.loads(run(*judged, "--harness-path", tmp_path, "--quiet", "--json").stdout)["harness"]
    cell = found["tasks"]["cats"]["metrics"]["acc"]
    assert cell["value"] in (pytest.approx(1 / 3), pytest.approx(2 / 3))  # three times the same question
    assert cell["standard_error"] == pytest.approx(1 / 3)
    result = run(*judged, "--harness-path", tmp_path, "--against", model)
    assert result.exit_code == 0, result.output
    assert re.search(
        r"cats +acc +3 +0\.\d{4} ± 0\.3333 +0\.\d{4} ± 0\.3333 +\+0\.0000 ± 0\.0000 \(0 gained, 0 lost\) +1\.000",
        result.stdout,
    )
    assert "Tokenizing" not in result.stderr
    assert "tasks, " in result.stderr
    assert "there is no task file 'dogs.yaml'" in refused(*judged, "--harness", "dogs.yaml")
    for more in (("--harness-path", tmp_path), ("--chat-template",), ("--limit", 3)):
        assert "no task was named" in refused(*judged[:-2], *more)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert "pip install 'prunekit[harness]'" in refused(*judged)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ((), "no model was given"),
        (("./gone",), "there is no model folder './gone'"),
        (("MODEL", "--dataset", "gone.txt"), "no file 'gone.txt'"),
        (("MODEL", "--dataset", "TEXT", "--tokens", "999999"), "too little text"),
        (("MODEL", "--seqlen", "1"), "--seqlen"),
    ],
)
def test_evaluate_refuses_in_one_sentence(model: Path, text: Path, arguments: tuple[str, ...], sentence: str) -> None:
    places = {"MODEL": model, "TEXT": text}
    assert sentence in refused("evaluate", *(places.get(argument, argument) for argument in arguments))


def test_check_runs_the_suite_of_the_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[str] = []

    def pytest_main(arguments: list[str]) -> int:
        written.append(Path(arguments[0]).read_text())
        return 1

    monkeypatch.setattr(pytest, "main", pytest_main)
    monkeypatch.setattr(pytest, "register_assert_rewrite", lambda _: None)  # this process has imported it
    assert run("check", "obs", "--set", "aim=dense").exit_code == 1
    module: dict[str, Any] = {}
    exec(written[0], module)
    assert issubclass(module["TestPruner"], PrunerSuite)
    assert module["TestPruner"].plugin == OBS(aim="dense")
    assert run("check", "tyr", "--kind", "allocator").exit_code == 1
    assert "class TestAllocator(testing.AllocatorSuite)" in written[1]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("obz",), "no plug-in 'obz'; did you mean 'obs'?"),
        (("obs", "--set", "aime=dense"), "did you mean 'aim'?"),
        (("obs", "--kind", "prune"), "no kind of plug-in 'prune'; did you mean 'pruner'?"),
        (("obs", "--kind", "allocator"), "no allocator 'obs'"),
        ((), "Missing argument"),
    ],
)
def test_check_refuses_in_one_sentence(arguments: tuple[str, ...], sentence: str) -> None:
    assert sentence in refused("check", *arguments)


def test_check_without_pytest_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("prunekit.cli.check.find_spec", lambda _: None)
    assert "pip install 'prunekit[testing]'" in refused("check", "obs")


def test_demo_compares_and_loads_back(monkeypatch: pytest.MonkeyPatch) -> None:
    from prunekit.demo import run as demo

    numbers = {"parameters": 1234567.0, "block parameters": 123456.0, "perplexity": 5.0, "size on disk": 2e6}
    rows = [("decode tokens/s", "12,345 ±12.3%", "12,345 ±10.0%", "no difference beyond noise")]
    found = demo.Demo(numbers, numbers, rows, "64 × 32 tokens read; medians", 1e-6)
    monkeypatch.setattr(demo, "run", lambda output, progress: found)
    result = run("demo", "--quiet")
    assert re.search(r"decode tokens/s +12,345 ±12.3% +12,345 ±10.0% +no difference beyond noise", result.stdout)
    assert max(map(len, map(str.rstrip, result.stdout.splitlines()))) <= 80
    assert "speed: 64 × 32 tokens read\n  medians\n" in result.stdout
    assert "logits differ by at most 1.0e-06" in result.stdout
    assert "2 MB" in result.stdout


def test_a_missing_extra_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def prune(*_: object, **__: object) -> None:
        raise ImportError("allocator 'optuna-tpe' of prunekit needs 'optuna', which is not installed")

    monkeypatch.setattr(pruning, "prune", prune)
    assert "needs 'optuna'" in refused("prune", "m", "-o", "out")


@pytest.mark.parametrize(
    "arguments", [("--help",), ("-h",), ("prune", "--help"), ("list", "-h"), ("plan", "--help"), ("--version",)]
)
def test_help_and_version(arguments: tuple[str, ...]) -> None:
    assert run(*arguments).exit_code == 0


def test_commands_that_work_in_a_folder_ask_for_it_in_the_same_words() -> None:
    commands: Any = get_command(app).commands  # type: ignore[attr-defined]
    asked = [
        {p.name: (p.opts, p.default) for p in commands[name].params} for name in ("prune", "tune", "learn-budgets")
    ]
    for field in fields(Work):
        assert field.name in asked[0]
        assert asked[0][field.name] == asked[1][field.name] == asked[2][field.name]


def test_unknown_commands_are_one_sentence() -> None:
    assert "No such command 'prun'" in refused("prun")
    assert "No such option: --foo; see prunekit --help" in refused("--foo")


def test_rows_that_were_not_measured_are_left_out() -> None:
    table = comparison("x", {"parameters": 10, "perplexity": 2.0}, {"parameters": 5})
    assert [list(column.cells) for column in table.columns] == [["parameters"], ["10"], ["5"], ["0.500"]]


def test_names_with_brackets_and_colons_are_no_markup(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(comparison("out/[/bold] [red]x :car:", {}, {}, [("[b]", ":x:", "", "")]))
    said = capsys.readouterr().out
    assert "out/[/bold] [red]x :car:" in said
    assert "[b]" in said
