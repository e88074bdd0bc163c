"""`prunekit export` and `prunekit verify`: what is beside a model is right or not there, and what differs is found."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner, Result

import prunekit
from prunekit.cli.export import DTYPE
from prunekit.cli.main import app
from prunekit.errors import CannotGoOn, NotVerified, WrongInput
from prunekit.export import formats
from prunekit.export.question import NEW
from prunekit.export.record import OWN, Record
from prunekit.models.shards import Shards
from prunekit.plugins.exporter import Exporter, Inquiry, Probe, Response
from prunekit.plugins.registry import EXPORTERS
from prunekit.run.export import export_model
from prunekit.run.verify import _check_dense, ask_engines, verify_result
from prunekit.system.files import SEAL, changed, others, seal, sealed
from prunekit_corner import Table
from prunekit_strategies.exporters.hf import HF
from prunekit_strategies.exporters.vllm import VLLM


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def refused(*arguments: object) -> str:
    """The sentence that a wrong command ends in."""
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output
    return result.stderr.strip().splitlines()[-1]


@pytest.fixture(scope="module")
def dense(saved_tiny: Callable[..., Path]) -> Path:
    return saved_tiny(torch.bfloat16)


@pytest.fixture(scope="module")
def result(dense: Path, tmp_path_factory: pytest.TempPathFactory, quick: Any) -> Path:
    """A result of unequal layers, in bfloat16."""
    output = tmp_path_factory.mktemp("result") / "out"
    prunekit.prune(dense, output=output, verify=False, **quick())
    return output


@pytest.fixture
def copy(result: Path, tmp_path: Path) -> Path:
    """A result that may be changed."""
    return shutil.copytree(result, tmp_path / "copy")


def content(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def differing(verdict: Any) -> list[str]:
    rows = [*verdict.rows, *(row for check in verdict.checks for row in check.rows)]
    return [row.what for row in rows if row.agrees is False]


# -- the record ----------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_run_leaves_a_record_of_what_the_judged_network_answered(result: Path) -> None:
    record = Record.read(result)
    assert record is not None
    model = AutoModelForCausalLM.from_pretrained(result, dtype=torch.float32).eval()
    logprobs, likeliest = Response.read(model(record.inquiry.ids, use_cache=False).logits, record.inquiry)
    torch.testing.assert_close(logprobs, record.logprobs, rtol=0, atol=1e-5)
    assert torch.equal(likeliest, record.inquiry.tokens[..., 1])
    assert (record.dtype, record.inquiry.new_tokens) == ("bfloat16", 16)
    assert record.parameters == json.loads((result / "report.json").read_text())["pruned"]["parameters"]
    assert {"judged/answers.json", "judged/answers.safetensors"} <= (sealed(result) or {}).keys()


def test_a_result_that_stays_in_memory_is_saved_with_the_same_record(
    result: Path, dense: Path, tmp_path: Path, quick: Any
) -> None:
    prunekit.prune(dense, verify=False, **quick()).save(tmp_path / "saved")
    for name in ("answers.json", "answers.safetensors"):
        assert (tmp_path / "saved/judged" / name).read_bytes() == (result / "judged" / name).read_bytes()


# -- verify --------------------------------------------------------------------------------------------


def test_a_result_agrees_with_the_network_that_was_judged(result: Path) -> None:
    found = run("verify", result, "--json", "--quiet")
    assert found.exit_code == 0, found.output
    told = json.loads(found.stdout)
    (check,) = told["checks"]
    assert (told["agrees"], told["against"]) == (True, "the network that was judged")
    assert (check["format"], check["engine"]) == ("hf", "transformers")
    assert [row["what"] for row in told["rows"]] == [
        "files", "parameters in the files", "of these in blocks", "sub-layers"
    ]  # fmt: skip
    assert [row["what"] for row in check["rows"]] == [
        "parameters", "tensors in the files", "log-probabilities", "likeliest tokens", "greedy tokens"
    ]  # fmt: skip
    table = run("verify", result, "--quiet").stdout
    assert "hf in transformers: greedy tokens" in table
    assert "DIFFERS" not in table


TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<it>{% endif %}"
)


def test_every_engine_answers_a_question_by_the_chat_template(copy: Path) -> None:
    (copy / "chat_template.jinja").write_text(TEMPLATE)
    tokenizer = AutoTokenizer.from_pretrained(copy)
    model: Any = AutoModelForCausalLM.from_pretrained(copy).float().eval()
    ids = tokenizer("<user>Who?<it>", return_tensors="pt").input_ids
    said = model.generate(ids, max_new_tokens=NEW, do_sample=False, eos_token_id=None, pad_token_id=0)[
        0, ids.shape[1] :
    ]
    whole = tokenizer.decode(said, skip_special_tokens=True).strip()
    assert answers(copy, "Who?") == [json.dumps(whole, ensure_ascii=False)]
    end = int(said[3])  # what is said behind an end of text is no answer
    (copy / "generation_config.json").write_text(json.dumps({"eos_token_id": [end, 1]}))
    until = said[: said.tolist().index(end)]
    assert answers(copy, "Who?") == [json.dumps(tokenizer.decode(until).strip(), ensure_ascii=False)]


def test_a_question_that_the_folder_cannot_take_is_refused(copy: Path) -> None:
    said = refused("verify", copy, "--quiet", "--ask", "")
    assert "leaves no token" in said
    (copy / "chat_template.jinja").write_text("{{ raise_exception('roles only') }}")
    assert "takes no question: roles only" in refused("verify", copy, "--quiet", "--ask", "Who?")
    (copy / "tokenizer.json").unlink()
    assert "has no tokenizer" in refused("verify", copy, "--quiet", "--ask", "Who?")


def answers(folder: Path, question: str) -> list[str]:
    verdict = verify_result(str(folder), question=question)
    return [row.found for check in verdict.checks for row in check.rows if row.what == "answer"]


def test_several_engines_are_asked_by_name(copy: Path) -> None:
    assert [check.engine for check in verify_result(str(copy), engines=["transformers"]).checks] == ["transformers"]
    assert "no engine 'nobody'" in refused("verify", copy, "--quiet", "--engine", "transformers,nobody")


def test_weights_that_are_not_the_judged_ones_differ_however_well_they_are_sealed(copy: Path) -> None:
    tensors = load_file(copy / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"] + 0.1
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    assert differing(verify_result(str(copy)))[:2] == ["files", "log-probabilities"]
    seal(copy)  # the folder agrees with itself again, and not with the network that was judged
    assert differing(verify_result(str(copy)))[0] == "log-probabilities"
    found = run("verify", copy, "--quiet")
    assert found.exit_code == 1
    assert "DIFFERS" in found.stdout


def test_a_report_of_other_sizes_differs(copy: Path) -> None:
    report = json.loads((copy / "report.json").read_text())
    report["pruned"]["parameters"] += 1
    kept = next(site for site in report["sites"] if site["kept"])
    kept["parameters"] -= 1
    (copy / "report.json").write_text(json.dumps(report))
    seal(copy)
    assert differing(verify_result(str(copy))) == ["parameters in the files", "sub-layers"]


def test_a_tensor_that_nothing_uses_differs(copy: Path) -> None:
    save_file({"spare": torch.zeros(3)}, copy / "spare.safetensors")
    assert differing(verify_result(str(copy))) == ["loads"]
    (copy / "spare.safetensors").unlink()
    tensors = load_file(copy / "model.safetensors") | {"model.layers.0.spare": torch.zeros(3)}
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    assert "loads" in differing(verify_result(str(copy)))


def test_an_engine_that_does_not_run_the_files_is_not_timed(
    copy: Path, dense: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_file({"spare": torch.zeros(3)}, copy / "spare.safetensors")
    monkeypatch.setattr(HF, "timer", lambda *_: pytest.fail("was opened"))
    (check,) = verify_result(str(copy), against=str(dense)).checks
    assert [row.what for row in check.rows if row.agrees is False] == ["loads"]
    assert check.speed == ()


@pytest.mark.parametrize("late", [True, False])
def test_an_engine_that_ends_while_it_is_timed_is_a_row(
    copy: Path, dense: Path, monkeypatch: pytest.MonkeyPatch, late: bool
) -> None:
    def ended(*_: Any) -> Any:
        raise NotVerified("the engine ended")

    monkeypatch.setattr(HF, "timer", (lambda *_: ended) if late else ended)
    verdict = verify_result(str(copy), against=str(dense))
    (check,) = verdict.checks
    assert [row[:2] for row in check.speed[1:]] == [("speed", "the engine ended")]
    assert verdict.agrees


def test_a_record_that_was_changed_judges_nothing(copy: Path) -> None:
    file = copy / "judged/answers.safetensors"
    content_of = bytearray(file.read_bytes())
    content_of[-1] ^= 1
    file.write_bytes(content_of)
    assert "judged/answers.safetensors is not what was written when the result was judged" in refused("verify", copy)


def test_wrong_words_are_refused_in_a_sentence(
    result: Path, dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "no engine 'tensorflow'; there are" in refused("verify", result, "--engine", "tensorflow")
    assert "has no record of a network that was judged" in refused("verify", dense)
    assert "there is no model folder" in refused("verify", tmp_path / "nothing")
    assert "holds nothing that onnxruntime runs; make it with prunekit export" in refused(
        "verify", result, "--engine", "onnxruntime"
    )
    monkeypatch.setattr(formats, "find_spec", lambda _: None)
    for command in (("verify", result, "--engine", "onnxruntime"), ("export", result, "--format", "onnx")):
        assert 'which is not installed: pip install "prunekit[onnx]"' in refused(*command)
    assert 'pip install "prunekit[onnx]"' in refused("prune", dense, "-o", tmp_path / "new", "--format", "hf,onnx")


def test_a_dense_model_that_cannot_be_timed_is_refused_before_anything_is_asked(
    result: Path, dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("prunekit.run.verify.ask", lambda *_: pytest.fail("an engine was asked"))
    for against in ("nowhere", tmp_path / "nowhere"):
        said = refused("verify", result, "--against", against, "--quiet")
        assert f"'{against}'" in said
        assert "folder" in said
    (tmp_path / "empty").mkdir()
    said = refused("verify", result, "--against", tmp_path / "empty", "--quiet")
    assert (
        f"is not there, and a dense model is timed in the same format; make it with prunekit export {tmp_path}" in said
    )
    monkeypatch.setattr(Table, "engine", "corner")
    both = {"hf": HF(), "table": Table()}
    _check_dense(str(dense), both, named=False)  # one of two can be timed
    with pytest.raises(WrongInput, match=r"tensors\.csv is not there"):
        _check_dense(str(dense), both, named=True)


def test_the_dense_model_is_timed_beside_the_pruned_one(
    result: Path, dense: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("prunekit.run.verify.ROUNDS", 6)
    found = run("verify", result, "--against", dense, "--quiet")
    assert found.exit_code == 0, found.output
    for what in ("size on disk", "prefill tokens/s", "decode tokens/s", "timed"):
        assert what in found.stdout


# -- export --------------------------------------------------------------------------------------------


def test_weights_in_another_dtype_and_several_files_are_the_same_model(result: Path, tmp_path: Path) -> None:
    out = tmp_path / "wide"
    found = run(
        "export", result, "--format", "hf", "--dtype", "float32", "--set", "hf.max_shard_size=100KB", "-o", out, "-q"
    )
    assert found.exit_code == 0, found.output
    assert "hf in transformers: log-probabilities" in found.stdout
    assert len(list(out.glob("model-*.safetensors"))) > 1
    one, other = (AutoModelForCausalLM.from_pretrained(path, dtype="auto") for path in (result, out))
    assert (one.dtype, other.dtype) == (torch.bfloat16, torch.float32)
    pairs = zip(one.float().state_dict().items(), other.state_dict().items(), strict=True)
    assert all(a == b and torch.equal(x, y) for (a, x), (b, y) in pairs)
    assert {"report.json", "recipe.yaml", "judged/answers.safetensors", "exports.json"} <= content(out).keys()
    assert (changed(out), others(out)) == ([], [])
    assert verify_result(str(out)).agrees
    again = refused("export", result, "--format", "hf", "-o", out)
    assert "exists and is not empty" in again
    assert run("export", result, "--format", "hf", "-o", out, "--overwrite", "-q", "--no-verify").exit_code == 0


def test_a_rounded_dtype_agrees_within_what_its_rounding_allows(result: Path, tmp_path: Path) -> None:
    made = export_model(str(result), [HF(dtype="float16")], tmp_path / "half")
    assert made.verdict is not None
    (check,) = made.verdict.checks
    row = next(row for row in check.rows if row.what == "log-probabilities")
    assert (row.judged, row.agrees) == ("within 0.1 nats", True)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "half", dtype="auto").dtype == torch.float16


def test_what_is_read_block_by_block_is_written_as_the_same_model(result: Path, tmp_path: Path) -> None:
    exporter = HF(dtype="float16", max_shard_size="100KB")
    for name, memory in (("whole", "auto"), ("paged", "100KiB")):
        export_model(str(result), [exporter], tmp_path / name, memory=memory)
    places = [str(tmp_path / name) for name in ("whole", "paged")]
    whole, paged = ({key: shards.read(key) for key in shards.tensors} for shards in map(Shards.of, places))
    assert whole.keys() == paged.keys()
    assert all(torch.equal(tensor, paged[name]) and tensor.dtype == torch.float16 for name, tensor in whole.items())
    assert len(list((tmp_path / "paged").glob("model-*.safetensors"))) > 1
    one, other = ((tmp_path / name / "config.json").read_text() for name in ("whole", "paged"))
    assert json.loads(one) == json.loads(other)


def test_a_format_with_a_place_of_its_own_lies_beside_the_model(copy: Path) -> None:
    before = content(copy)
    (copy / "notes.txt").write_text("mine")
    assert export_model(str(copy), [Table()]).files == (copy / "tensors.csv",)
    after = content(copy)
    assert {name: after[name] for name in before if name != SEAL} == {n: c for n, c in before.items() if n != SEAL}
    assert after.keys() - before.keys() == {"notes.txt", "tensors.csv", "exports.json"}
    assert (changed(copy), others(copy)) == ([], ["notes.txt"])  # the export is the result's own, the notes are not
    with pytest.raises(WrongInput, match=r"tensors\.csv exists and is not replaced"):
        export_model(str(copy), [Table()])
    assert content(copy) == after


class Faulty(Table):
    """Writes what it does not find again."""

    def verify(self, path: Path, probe: Probe) -> None:
        raise NotVerified("it is something else")


class Wrong(Table):
    """Runs in an engine that says something else."""

    engine = "wrong"

    def answers(self, path: Path, inquiry: Inquiry) -> Response:
        new = torch.zeros(inquiry.new_tokens, dtype=torch.long)
        return Response(torch.zeros(inquiry.tokens.shape), inquiry.tokens[..., 1], new)


@pytest.mark.parametrize(
    ("exporter", "sentence"),
    [
        (Faulty(), "Faulty export was not kept: it is"),
        (Wrong(), "Wrong export was not kept: log-probabilities in wrong"),
    ],
)
def test_what_is_not_verified_is_not_there(exporter: Exporter, sentence: str, copy: Path, tmp_path: Path) -> None:
    before = content(copy)
    with pytest.raises(CannotGoOn, match=sentence):
        export_model(str(copy), [exporter])
    with pytest.raises(CannotGoOn, match=sentence):
        export_model(str(copy), [HF(), exporter], tmp_path / "new")
    assert content(copy) == before
    assert {path.name for path in tmp_path.iterdir()} == {"copy"}
    assert export_model(str(copy), [exporter], verify=False).verdict is None


def test_an_engine_that_no_exporter_asks_is_asked_before_a_result_is_kept(
    dense: Path, copy: Path, tmp_path: Path, quick: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = Record.read(copy)
    assert record is not None
    monkeypatch.setattr(VLLM, "verify", lambda *_: None)
    monkeypatch.setattr(VLLM, "answers", lambda _, path, inquiry: Wrong().answers(path, inquiry))
    monkeypatch.setattr("prunekit.run.verify.why_not_run", lambda _: None)
    with pytest.raises(CannotGoOn, match="the result was not kept: log-probabilities in vllm: within"):
        prunekit.prune(dense, output=tmp_path / "out", **quick(exporters=["vllm"], verify=True))
    assert not (tmp_path / "out").exists()
    said = list[str]()
    monkeypatch.setattr(
        VLLM, "answers", lambda *_: Response(record.logprobs, record.inquiry.tokens[..., 1], record.continuation)
    )
    ask_engines([HF(), VLLM()], copy, record, said.append)  # what asks its engine itself is not asked again
    monkeypatch.setattr("prunekit.run.verify.why_not_run", lambda _: "it is not installed")
    ask_engines([VLLM()], copy, record, said.append)
    assert said == [
        "vllm answers what the network that was judged does",
        "vllm was not asked whether it runs the result: it is not installed",
    ]  # fmt: skip


def test_what_help_says_of_dtypes_is_what_formats_take() -> None:
    said = dict(re.findall(r"(hf|vllm|onnx|gguf)[^:;.]*: ([^;.]*)", DTYPE.replace("hf and vllm", "hf")))
    for name in ("hf", "onnx", "gguf"):
        taken = set(re.findall(r"\b(?:float32|float16|bfloat16|f32|f16|bf16|q8_0)\b", said[name]))
        assert all(EXPORTERS.build({"name": name, "dtype": dtype}) for dtype in taken)
        listed = next(o for o in EXPORTERS[name].options if o.name == "dtype")
        assert taken == {*get_args(listed.hint)} - {"auto"} or name == "gguf"
    assert get_type_hints(VLLM)["dtype"] == get_type_hints(HF)["dtype"]


def test_a_member_of_a_family_is_extended_with_the_family(dense: Path, tmp_path: Path, quick: Any) -> None:
    family = tmp_path / "family"
    prunekit.prune(dense, output=family, verify=False, **quick(allocator="uniform", sparsity=[0.2, 0.4]))
    export_model(str(family / "0.2"), [Table()])
    assert (changed(family), others(family), changed(family / "0.2")) == ([], [], [])


def test_a_result_that_was_changed_is_not_exported(copy: Path, tmp_path: Path) -> None:
    (copy / "config.json").write_text((copy / "config.json").read_text() + " ")
    assert "config.json is not what was written" in refused("export", copy, "--format", "hf", "-o", tmp_path / "new")


def test_a_model_that_was_never_pruned_is_exported_too(dense: Path, tmp_path: Path) -> None:
    before, out = content(dense), tmp_path / "out"
    made = run("export", dense, "--format", "hf", "-o", out, "-q")
    assert made.exit_code == 0
    assert f"expected: of {OWN}" in " ".join(made.stdout.split())
    assert content(dense) == before
    verdict = verify_result(str(out))  # with what its model answered when it was exported
    assert (verdict.agrees, verdict.against) == (True, OWN)
    assert run("export", dense, "--format", "hf", "-o", out, "--overwrite", "-q", "--no-verify").exit_code == 0


def test_wrong_formats_are_refused_in_a_sentence(result: Path, dense: Path, tmp_path: Path) -> None:
    assert "no --format was given; there are " in refused("export", result)
    assert "no exporter 'gufg'" in refused("export", result, "--format", "gufg")
    assert "is a folder of its own; give a new one with --output" in refused("export", result, "--format", "hf")
    dtype = refused("export", result, "--format", "hf", "--dtype", "float8", "-o", tmp_path / "new")
    assert "exporter 'hf': no dtype 'float8'; there are auto, float32, float16, bfloat16" in dtype
    option = refused("export", result, "--format", "hf", "--set", "hf.shards=3", "-o", tmp_path / "new")
    assert "no option of exporter 'hf' 'shards'" in option
    other = refused("export", result, "--format", "hf", "--set", "onnx.dtype=float16", "-o", tmp_path / "new")
    assert "--set takes FORMAT.option=value for hf" in other
    assert "max_shard_size" in refused("export", result, "--format", "hf", "--set", "exporter.max_shard_size=big")


def test_formats_of_a_run_are_given_by_comma(dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from prunekit.run import prune as pruning

    asked: list[Any] = []

    def prune(recipe: Any, job: Any) -> Any:
        asked.append(recipe)
        raise WrongInput("enough")

    monkeypatch.setattr(pruning, "prune", prune)
    refused("prune", dense, "-o", tmp_path / "new", "--format", "hf,onnx", "--set", "exporters.onnx.dtype=float16")
    assert [dict(spec) for spec in asked[0].exporters] == [{"name": "hf"}, {"name": "onnx", "dtype": "float16"}]
