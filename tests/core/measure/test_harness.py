"""Scores are those that one computes by hand, pairs are of the same items, and no mean is of two metrics unsaid."""

import copy
import json
import math
import random
import statistics
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import prunekit as pk
from prunekit.data.harness import SUITE_TASKS, Exam, HarnessSpec
from prunekit.measure.harness import CHOSEN, Paper, Score, ask, results, sign_test
from prunekit.models.opening import fingerprint


def paper(items: Mapping[str, list[float]] | None = None, **values: float) -> Paper:
    scores = {metric: Score.of(found) for metric, found in (items or {}).items()}
    scores |= {metric: Score(value) for metric, value in values.items()}
    return Paper(
        max((len(score.items) for score in scores.values()), default=4), 0, 1.0, "", scores, dict.fromkeys(scores, True)
    )


# -- what is made of scores -----------------------------------------------------------------------


def test_a_score_is_a_mean_with_its_standard_error() -> None:
    score = Score.of([1.0, 0.0, 0.0, 1.0, 1.0])
    assert (score.value, score.error) == (0.6, pytest.approx(statistics.stdev(score.items) / math.sqrt(5)))
    assert Score.of([1.0]).error is None


def test_a_difference_is_paired_item_by_item() -> None:
    one, two = [1.0, 1.0, 0.0, 1.0, 0.0, 1.0], [1.0, 0.0, 0.0, 1.0, 1.0, 0.0]
    cell = results(Exam(), {"a": paper({"acc": one})}, {"a": paper({"acc": two})})["tasks"]["a"]["metrics"]["acc"]
    apart = [x - y for x, y in zip(one, two, strict=True)]
    assert cell["difference"]["value"] == pytest.approx(cell["value"] - cell["against"]["value"])
    assert cell["difference"]["standard_error"] == pytest.approx(statistics.stdev(apart) / math.sqrt(6))
    assert (cell["difference"]["gained"], cell["difference"]["lost"]) == (2, 1)
    assert cell["difference"]["p"] == 1  # 3 of 3 coins fall no more evenly than this


def test_two_that_agree_on_nearly_all_items_differ_by_less_than_either_is_sure_of() -> None:
    one = [float(i % 2) for i in range(100)]
    two = [1 - one[0], *one[1:]]
    cell = results(Exam(), {"a": paper({"acc": one})}, {"a": paper({"acc": two})})["tasks"]["a"]["metrics"]["acc"]
    assert cell["difference"]["standard_error"] < cell["standard_error"] / 4


@pytest.mark.parametrize(("gained", "lost", "p"), [(0, 0, 1.0), (3, 3, 1.0), (0, 5, 2 / 32), (9, 1, 22 / 1024)])
def test_the_sign_test_counts_coins(gained: int, lost: int, p: float) -> None:
    assert sign_test(gained, lost) == pytest.approx(p) == sign_test(lost, gained)


def test_what_is_no_mean_over_items_has_no_error() -> None:
    found = results(Exam(), {"a": paper(word_perplexity=9.0)}, {"a": paper(word_perplexity=7.0)})
    cell = found["tasks"]["a"]["metrics"]["word_perplexity"]
    assert (cell["value"], cell["standard_error"]) == (9.0, None)
    assert cell["difference"] == {"value": 2.0, "standard_error": None}


def test_a_mean_is_of_tasks_and_so_is_its_error() -> None:
    a, b = [1.0, 0.0, 1.0, 1.0], [0.0, 1.0]
    means = results(Exam(), {"a": paper({"acc": a}), "b": paper({"acc": b})})["means"]
    assert means["acc"]["value"] == pytest.approx((0.75 + 0.5) / 2)
    errors = Score.of(a).error, Score.of(b).error
    assert means["acc"]["standard_error"] == pytest.approx(math.hypot(*errors) / 2)  # type: ignore[arg-type]
    assert "acc_norm" not in means


def test_a_group_is_weighted_as_it_says() -> None:
    tasks = [SimpleNamespace(task_name=name) for name in "ab"]
    papers = {"a": paper({"acc": [1.0, 0.0, 1.0, 1.0]}), "b": paper({"acc": [0.0, 1.0]})}
    for by_size, value in ((True, (3 + 1) / 6), (False, (0.75 + 0.5) / 2)):
        wanted = SimpleNamespace(metric="acc", weight_by_size=by_size)
        group = SimpleNamespace(aggregate_metric_list=[wanted], get_all_tasks=lambda: tasks)
        found = results(Exam(groups={"both": group}), papers)["groups"]["both"]
        assert found["metrics"]["acc"]["value"] == pytest.approx(value)


def test_the_suite_has_three_means_and_each_says_of_what() -> None:
    both = {name: paper({"acc": [1.0, 0.0], "acc_norm": [1.0, 1.0]}) for name in SUITE_TASKS}
    for name in ("boolq", "winogrande"):  # these have no acc_norm
        both[name] = paper({"acc": [1.0, 0.0]})
    means = results(Exam(), both)["means"]
    assert list(means) == ["acc", "acc, or acc_norm of hellaswag, arc_challenge and openbookqa"]
    assert [means[of]["value"] for of in means] == pytest.approx([0.5, (4 * 0.5 + 3 * 1) / 7])
    assert means["acc, or acc_norm of hellaswag, arc_challenge and openbookqa"]["metrics"] == CHOSEN


def test_answers_that_are_not_finite_are_no_score() -> None:
    found = results(
        Exam(),
        {"a": paper(acc=math.nan), "b": paper({"acc": [1.0, 0.0]})},
        {"a": paper({"acc": [1.0]}), "b": paper({"acc": [1.0, 0.0]})},
    )
    assert found["tasks"]["a"]["metrics"]["acc"]["value"] is None
    assert found["means"]["acc"]["value"] is None
    json.dumps(found, allow_nan=False)


# -- with the harness -----------------------------------------------------------------------------

ROWS = [
    {"prompt": "a cat sat on the", "choices": ["mat", "sky and the sea", "of"], "answer": 0},
    {"prompt": "the dog ran to the", "choices": ["tree", "blue", "an"], "answer": 1},
    {"prompt": "one and two", "choices": ["are three", "is", "five of them all"], "answer": 2},
    {"prompt": "say", "choices": ["no", "yes"], "answer": 1},
    {"prompt": "the end of it", "choices": ["is near", "was"], "answer": 0},
]
YAML = """
task: asked
dataset_path: json
dataset_kwargs: {data_files: {test: rows.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{prompt}}"
doc_to_choice: choices
doc_to_target: answer
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("lm_eval")
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    (folder / "asked.yaml").write_text(YAML)
    return folder


@pytest.fixture(scope="module")
def judged(saved_letters: Callable[..., Path]) -> tuple[Any, Any]:
    """(a model with one token per letter, its tokenizer)."""
    path = saved_letters()
    return AutoModelForCausalLM.from_pretrained(path).eval(), AutoTokenizer.from_pretrained(path)


def opened(folder: Path, *names: str) -> Exam:
    from prunekit.data.harness import open_tasks

    return open_tasks(names, str(folder))


def scores_by_hand(model: Any, tokenizer: Any) -> dict[str, list[float]]:
    """Whether the right choice has the highest log-likelihood, and the highest per character, without padding."""
    found: dict[str, list[float]] = {"acc": [], "acc_norm": []}
    for row in ROWS:
        logs = []
        for choice in row["choices"]:
            start = len(tokenizer.encode(row["prompt"]))
            ids = torch.tensor([tokenizer.encode(f"{row['prompt']} {choice}")])
            with torch.no_grad():
                log_q = model(ids).logits[0].double().log_softmax(-1)
            logs.append(sum(float(log_q[t - 1, ids[0, t]]) for t in range(start, ids.shape[1])))
        for metric, lengths in (("acc", [1] * len(logs)), ("acc_norm", [len(choice) for choice in row["choices"]])):
            best = max(range(len(logs)), key=lambda i: logs[i] / lengths[i])
            found[metric].append(float(best == row["answer"]))
    return found


def test_scores_are_those_of_the_model_asked_directly(folder: Path, judged: tuple[Any, Any]) -> None:
    exam = opened(folder, "asked", "rows")
    before = fingerprint(judged[0])
    found = ask(exam, *judged, HarnessSpec(("asked", "rows")))
    expected = scores_by_hand(*judged)
    for task in ("asked", "rows"):  # a task of the harness, and a file of ours: the same questions
        assert {metric: list(score.items) for metric, score in found[task].scores.items()} == expected
        assert (found[task].items, found[task].shots) == (5, 0)
    assert found["asked"].digest == found["rows"].digest
    assert fingerprint(judged[0]) == before
    assert judged[1].pad_token is None


def test_a_batch_changes_nothing(folder: Path, judged: tuple[Any, Any]) -> None:
    exam = opened(folder, "asked")
    one, many = (ask(exam, *judged, HarnessSpec((), batch_size=size))["asked"] for size in (1, 16))
    assert one == many


def test_dense_and_pruned_are_asked_the_same(folder: Path, judged: tuple[Any, Any]) -> None:
    exam, spec = opened(folder, "asked"), HarnessSpec(("asked",), limit=4)
    other = copy.deepcopy(judged[0])
    with torch.no_grad():
        other.model.layers[0].mlp.down_proj.weight.mul_(-9)
    dense, pruned = ask(exam, *judged, spec), ask(exam, other, judged[1], spec)
    found = results(exam, pruned, dense)["tasks"]["asked"]
    assert found["items"] == 4
    assert found["same_prompts"]
    for metric, cell in found["metrics"].items():
        apart = [
            a - b
            for a, b in zip(pruned["asked"].scores[metric].items, dense["asked"].scores[metric].items, strict=True)
        ]
        assert cell["difference"]["value"] == pytest.approx(sum(apart) / 4)
    same = results(exam, dense, dense)["tasks"]["asked"]["metrics"]["acc"]["difference"]
    assert same == {"value": 0, "standard_error": 0, "gained": 0, "lost": 0, "p": 1}


def test_a_model_that_answers_nan_has_no_score(folder: Path, judged: tuple[Any, Any]) -> None:
    broken = copy.deepcopy(judged[0])
    with torch.no_grad():
        broken.lm_head.weight.fill_(math.nan)
    exam = opened(folder, "asked")
    found = ask(exam, broken, judged[1], HarnessSpec(("asked",)))
    assert all(math.isnan(score.value) and not score.items for score in found["asked"].scores.values())


def test_messages_are_written_by_the_chat_template(folder: Path, judged: tuple[Any, Any]) -> None:
    exam, (model, tokenizer) = opened(folder, "asked"), judged
    with pytest.raises(pk.WrongInput, match="has no chat template; leave --chat-template away"):
        ask(exam, model, tokenizer, HarnessSpec(("asked",), chat_template=True))
    talking = copy.deepcopy(tokenizer)
    talking.chat_template = "{% for m in messages %}you say {{ m['content'] }} and i say{% endfor %}"
    plain = ask(exam, model, talking, HarnessSpec(("asked",)))
    chat = ask(exam, model, talking, HarnessSpec(("asked",), chat_template=True))
    assert plain["asked"].digest != chat["asked"].digest
    asked = {instance.args[0] for instance in exam.tasks["asked"].instances}
    assert "you say a cat sat on the and i say" in asked


def test_the_harness_leaves_no_trace(folder: Path, judged: tuple[Any, Any], capsys: pytest.CaptureFixture[str]) -> None:
    import lm_eval.api.task
    import lm_eval.utils

    before = lm_eval.utils.env, lm_eval.api.task.tqdm, random.getstate(), torch.get_rng_state().tolist()  # type: ignore[attr-defined]
    ask(opened(folder, "asked"), *judged, HarnessSpec(("asked",)))
    after = lm_eval.utils.env, lm_eval.api.task.tqdm, random.getstate(), torch.get_rng_state().tolist()  # type: ignore[attr-defined]
    assert after == before
    said = capsys.readouterr()
    assert said.out == said.err == ""


def test_the_suite_is_in_the_harness_with_the_metrics_that_are_averaged() -> None:
    home = Path(pytest.importorskip("lm_eval").__file__).parent / "tasks"
    from lm_eval.tasks import TaskManager
    from lm_eval.tasks._yaml_loader import load_yaml

    for name, place in SUITE_TASKS.items():
        entry = TaskManager(include_path=str(home / place), include_defaults=False).task_index[name]
        assert entry.yaml_path is not None
        config = load_yaml(entry.yaml_path, resolve_func=False)
        metrics = {each["metric"] for each in config["metric_list"]}
        assert {"acc", CHOSEN[name]} <= metrics
        assert config["output_type"] == "multiple_choice"
        assert config.get("num_fewshot") is None


TASKS = Path(__file__).parents[3] / "benchmarks" / "tasks"


@pytest.mark.skipif(not TASKS.exists(), reason="the tests are elsewhere than the benchmarks")
def test_the_tasks_of_the_repository_are_asked_of_the_bundled_model(folder: Path) -> None:
    from prunekit.demo import MODEL

    exam = opened(TASKS, "facts", "python")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(MODEL), AutoTokenizer.from_pretrained(MODEL)
    found = ask(exam, model.float(), tokenizer, HarnessSpec((), limit=10))
    assert list(found) == ["facts", "python"]
    assert all(sorted(paper.scores) == ["acc", "acc_norm"] for paper in found.values())
    assert [len(task.eval_docs) for task in exam.tasks.values()] == [48, 44]
    for task in exam.tasks.values():  # by the number of the right choice nothing can be guessed
        places = [task.doc_to_target(doc) for doc in task.eval_docs]
        assert max(map(places.count, places)) < len(places) / 3
        assert all(len(set(task.doc_to_choice(doc))) == 4 for doc in task.eval_docs)


CHOICES = {"text": ["the sun", "a cat", "of"], "label": ["A", "B", "C"]}
HUB = {
    "aps/super_glue": {"passage": "a cat sat.", "question": "did a cat sit", "label": 1, "idx": 0},
    "baber/piqa": {"goal": "to eat", "sol1": "cook", "sol2": "sleep", "label": 0},
    "Rowan/hellaswag": {
        "ctx_a": "a man sits.", "ctx_b": "he", "activity_label": "sitting", "endings": ["stands", "is", "a", "of"],
        "label": "2",
    },
    "allenai/winogrande": {"sentence": "the cat saw _ run", "option1": "a dog", "option2": "it", "answer": "2"},
    "allenai/ai2_arc": {"question": "what is hot", "choices": CHOICES, "answerKey": "A"},
    "allenai/openbookqa": {"question_stem": "hot is", "choices": CHOICES, "answerKey": "B"},
}  # fmt: skip


def test_the_suite_is_asked_of_a_model(folder: Path, judged: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    from prunekit.data.harness import SUITE

    asked = []

    def load_dataset(path: str, **_: object) -> dict[str, Any]:
        asked.append(path)
        return {split: datasets.Dataset.from_list([HUB[path]] * 2) for split in ("train", "validation", "test")}

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    exam = opened(folder, SUITE)
    assert list(exam.tasks) == list(SUITE_TASKS)
    assert {*asked} == {*HUB}
    papers = ask(exam, *judged, HarnessSpec((SUITE,)))
    found = results(exam, papers, papers)
    assert all(row["items"] == 2 and row["few_shot"] == 0 for row in found["tasks"].values())
    assert len(found["means"]) == 2
    prompts = {name: task.instances[0].args[0] for name, task in exam.tasks.items()}
    assert prompts["boolq"] == "a cat sat.\nQuestion: did a cat sit?\nAnswer:"
    assert prompts["winogrande"] == "the cat saw a dog"
    assert prompts["openbookqa"] == "hot is"


def test_models_in_memory_are_asked_from_python(
    folder: Path, judged: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("prunekit.measure.speed.timed", lambda net, work: (10**8, 10**8))
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 60)
    text: dict[str, Any] = {"dataset": tmp_path / "text.txt", "seqlen": 16, "tokens": 64, "quiet": True}
    found = pk.evaluate(*judged, against=judged[0], harness=folder / "asked.yaml", limit=2, **text)
    row = found["harness"]["tasks"]["asked"]
    assert (row["items"], row["same_prompts"], found["harness"]["limit"]) == (2, True, 2)
    assert row["metrics"]["acc"]["difference"]["value"] == 0
    assert "harness" not in pk.evaluate(*judged, **text)
    with pytest.raises(pk.WrongInput, match="no task was named"):
        pk.evaluate(*judged, harness_path=folder, **text)
