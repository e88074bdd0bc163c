"""Task files are read once, for the search and for the judgement, and what is wrong with one is a sentence."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants
from transformers import AutoTokenizer

import prunekit as pk
from prunekit.data import harness
from prunekit.data.draws import draw
from prunekit.data.harness import check_names, open_tasks, questions
from prunekit.data.spec import DataSpec
from prunekit.data.tasks import TaskRow, task_rows

pytest.importorskip("lm_eval")

ROWS = [
    {"prompt": "a cat sat on the", "choices": ["mat", "sky"], "answer": 0},
    {"prompt": "say ", "choices": ["no", "yes"], "answer": "yes"},
]
YAML = """
task: asked
dataset_path: json
dataset_kwargs: {data_files: {test: rows.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{prompt}}"
doc_to_choice: choices
doc_to_target: "{{answer if answer in choices else choices[answer]}}"
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, ROWS[:1] * 3)))
    (tmp_path / "asked.yaml").write_text(YAML)
    return tmp_path


def test_a_question_has_a_blank_before_its_choices_where_there_is_none() -> None:
    assert TaskRow("a", ("b", "c"), 0).question.answers == (" b", " c")
    assert TaskRow("a ", ("b", "c"), 0).question.answers == ("b", "c")
    assert TaskRow("a", (" b", " c"), 0).question.answers == (" b", " c")


def test_questions_of_the_harness_are_those_of_the_file(folder: Path) -> None:
    own = [row.question for row in task_rows(str(folder / "rows.jsonl"))]
    assert list(questions(str(folder / "asked.yaml"))) == own


def test_the_search_reads_the_task_that_is_judged_on(folder: Path, saved_letters: Callable[..., Path]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(saved_letters())
    (folder / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 60)
    few: dict[str, Any] = {"calibration_tokens": 64, "search_tokens": 500, "evaluation_tokens": 64, "seqlen": 32}

    def drawn(name: str) -> Any:
        return draw(
            tokenizer, DataSpec(dataset=str(folder / "text.txt"), search_dataset=str(folder / name), **few)
        ).search

    one, two = drawn("asked.yaml"), drawn("rows.jsonl")
    assert one.answers is not None
    assert one.digest == two.digest
    with pytest.raises(pk.WrongInput, match="holds questions, which only judge"):
        draw(tokenizer, DataSpec(dataset=str(folder / "asked.yaml"), **few))


def test_a_yaml_file_that_names_no_task_is_text(folder: Path, saved_letters: Callable[..., Path]) -> None:
    (folder / "text.yaml").write_text("the quick brown fox: jumps over the lazy dog\n" * 60)
    spec = DataSpec(
        dataset=str(folder / "text.yaml"), calibration_tokens=64, search_tokens=64, evaluation_tokens=64, seqlen=8
    )
    assert draw(AutoTokenizer.from_pretrained(saved_letters()), spec).calibration.answers is None


def test_where_a_task_file_is_read_from_does_not_matter(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.parent)
    by_name = open_tasks(["asked"], str(folder)).tasks
    by_file = open_tasks([str(folder / "asked.yaml")]).tasks
    relative = open_tasks([f"{folder.name}/asked.yaml", f"{folder.name}/rows.jsonl"]).tasks
    assert [len(tasks["asked"].eval_docs) for tasks in (by_name, by_file, relative)] == [3, 3, 3]
    assert list(relative) == ["asked", "rows"]


def test_a_group_brings_its_tasks(folder: Path) -> None:
    (folder / "more.yaml").write_text(YAML.replace("task: asked", "task: more"))
    (folder / "group.yaml").write_text(
        "group: both\ntask: [asked, more]\naggregate_metric_list: [{metric: acc, weight_by_size: true}]\n"
    )
    found = open_tasks(["both"], str(folder))
    assert list(found.tasks) == ["asked", "more"]
    assert list(found.groups) == ["both"]


FUNCTION = YAML.replace("doc_to_choice: choices", "doc_to_choice: !function code.choices")


@pytest.mark.parametrize(
    ("files", "sentence"),
    [
        ({"asked.yaml": "task: [unclosed"}, "asked.yaml is no YAML file, or is damaged"),
        ({"asked.yaml": FUNCTION}, r"brings code of its own \(doc_to_choice: code\.choices\).*--trust-remote-code"),
        (
            {"asked.yaml": "task: asked\ndataset_path: pandas"},
            r"\(dataset_path: pandas, rows in a pickle\)",
        ),
        ({"asked.yaml": "include: other.yaml\ntask: asked", "other.yaml": FUNCTION}, "other.yaml brings code"),
        ({"asked.yaml": YAML + "metric_list: [{metric: ./evil.py}]"}, r"the metric \./evil\.py, of another library"),
        ({"asked.yaml": YAML.replace("rows.jsonl", "gone.jsonl")}, "reads .*gone.jsonl, which is not there"),
        ({"rows.jsonl": ""}, r"rows\.jsonl has no rows"),
        ({"rows.jsonl": '{"prompt": "a"'}, r"rows\.jsonl, line 1"),
        ({"rows.jsonl": "[1, 2]"}, "is 1, not an object"),
        ({"asked.yaml": YAML.replace("{{prompt}}", "{{promt}}")}, "cannot read task 'asked': 'promt' is undefined"),
        ({"asked.yaml": YAML.replace("{{prompt}}", "{{ prompt.__class__ }}")}, "cannot read task 'asked'.*unsafe"),
        ({"asked.yaml": YAML.replace("test_split: test", "test_split: other")}, "cannot read task 'asked'"),
    ],
)
def test_a_broken_task_is_one_sentence(folder: Path, files: dict[str, str], sentence: str) -> None:
    for name, content in files.items():
        (folder / name).write_text(content)
    with pytest.raises(pk.WrongInput, match=sentence) as caught:
        open_tasks(["asked"], str(folder))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("rows", "sentence"),
    [
        ("", "has no rows"),
        ('{"prompt": "a", "answer": "b"}', "without a wrong choice"),
        ('{"prompt": "a", "choices": ["b", "c"], "answer": 7}', "question 1: 'answer' is one of the choices"),
    ],
)
def test_broken_questions_are_one_sentence(folder: Path, rows: str, sentence: str) -> None:
    (folder / "rows.jsonl").write_text(rows)
    with pytest.raises(pk.WrongInput, match=sentence):
        open_tasks([str(folder / "rows.jsonl")])


def test_code_of_a_task_runs_where_the_caller_allows_it(folder: Path) -> None:
    (folder / "asked.yaml").write_text(FUNCTION)
    (folder / "code.py").write_text("def choices(doc):\n    return doc['choices'][::-1]\n")
    task = open_tasks(["asked"], str(folder), trust_remote_code=True).tasks["asked"]
    assert task.doc_to_choice(ROWS[0]) == ["sky", "mat"]
    with pytest.raises(pk.WrongInput, match="brings code"):  # no recipe can allow it
        list(questions(str(folder / "asked.yaml")))


def test_questions_are_of_multiple_choice(folder: Path) -> None:
    (folder / "asked.yaml").write_text(YAML.replace("multiple_choice", "loglikelihood"))
    with pytest.raises(pk.WrongInput, match="asked is a task of loglikelihood; questions are of multiple_choice"):
        list(questions(str(folder / "asked.yaml")))


@pytest.mark.parametrize(
    ("names", "folder", "sentence"),
    [
        ([], None, "no task was named"),
        (["asked"], "gone", "there is no folder 'gone' of task files"),
        (["gone.yaml"], None, "there is no task file 'gone.yaml'"),
    ],
)
def test_what_is_not_there_is_one_sentence(names: list[str], folder: str | None, sentence: str) -> None:
    with pytest.raises(pk.WrongInput, match=sentence):
        check_names(names, folder)


def test_without_the_hub_only_files_can_be_asked(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(harness, "hub_is_away", lambda: "the hub did not answer within 3 s")
    with pytest.raises(pk.WrongInput, match=r"no task file 'boolq' \(in .* there are asked, rows\).*did not answer"):
        open_tasks(["pruning-suite"], str(folder))
    assert list(open_tasks(["asked"], str(folder)).tasks) == ["asked"]


@pytest.mark.slow
def test_an_unknown_task_is_guessed_at(folder: Path) -> None:
    with pytest.raises(pk.WrongInput, match=r"no task 'hellaswagg'; did you mean .*in .* there are asked, rows"):
        open_tasks(["hellaswagg"], str(folder))


def test_what_was_not_downloaded_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def load_dataset(*_: object, **__: object) -> None:
        raise ConnectionError("Couldn't reach 'aps/super_glue' on the Hub (OfflineModeIsEnabled)\nmore")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(pk.WrongInput, match="cannot read task 'boolq': Couldn't reach 'aps/super_glue'") as caught:
        open_tasks(["boolq"])
    assert "\n" not in str(caught.value)


def test_the_package_is_named_that_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ImportError, match=r"pip install 'prunekit\[harness\]'"):
        open_tasks(["boolq"])
