"""How well a model does the tasks of lm-evaluation-harness, and by how much another differs on the same items.

A score is the mean over items, with its standard error, where its task takes the mean. Two models are compared item by
item: what both get right, or wrong, does not blur the difference.
"""

from __future__ import annotations

import copy
import hashlib
import math
import operator
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from prunekit.data.harness import SUITE_TASKS, Exam, HarnessSpec, prepare, quiet
from prunekit.errors import WrongInput, one_line
from prunekit.measure.perplexity import LOGITS_AT_ONCE
from prunekit.models.modules import evaluating, text_config
from prunekit.system.progress import Progress, Stage

PROMPT = 256  # tokens of a request by which a batch is chosen
MOST = 64  # requests in a forward pass
CHOSEN = {name: "acc_norm" if name in ("hellaswag", "arc_challenge", "openbookqa") else "acc" for name in SUITE_TASKS}
"""The metric of each task of the suite that enters its third mean."""


@dataclass(frozen=True)
class Score:
    """What one metric says of a model."""

    value: float  # nan: the model's answers are not finite
    error: float | None = None  # standard error; None: the metric is no mean over items
    items: tuple[float, ...] = ()  # of each item, where the metric is their mean

    @classmethod
    def of(cls, items: Sequence[float]) -> Score:
        """The mean of items, with its standard error."""
        return cls(math.fsum(items) / len(items), _error(items), tuple(items))


@dataclass(frozen=True)
class Paper:
    """What a model answered to one task."""

    items: int
    shots: int
    version: Any
    digest: str  # sha256 of all that it was asked
    scores: Mapping[str, Score]  # by metric; a filter of answers stands behind a comma
    higher: Mapping[str, bool]  # whether more is better


def ask(
    exam: Exam,
    model: Any,
    tokenizer: Any,
    spec: HarnessSpec,
    *,
    name: str = "",
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> dict[str, Paper]:
    """Let a model do tasks.

    Args:
        exam: the tasks.
        model: a causal language model in memory, of whatever dtype and device.
        tokenizer: its own.
        spec: how they are asked.
        name: of the model, for messages.
        trust_remote_code: whether code in task files may run.
        progress: what the user is told.

    Raises:
        WrongInput: the tokenizer has no chat template and one is wanted, or a task cannot be asked.
    """
    check_tokenizer(tokenizer, spec, name)
    progress, batch = progress or Progress(), spec.batch_size or batch_of(model)
    with quiet(trust_remote_code) as heard, evaluating(model):
        from lm_eval.evaluator import evaluate

        for task in exam.tasks.values():
            prepare(task)
        asked = _adapter(model, tokenizer, batch, progress, name)
        heard.clear()
        try:
            found: Any = evaluate(
                lm=asked,
                task_dict={"tasks": exam.tasks, "groups": exam.groups, "group_map": {}},  # type: ignore[arg-type]
                limit=spec.limit,
                bootstrap_iters=0,  # the errors are ours: they are of items, which pairs need as well
                apply_chat_template=spec.chat_template,
                fewshot_as_multiturn=spec.chat_template,
            )
        except Exception as error:  # of templates, of an answer of no token, of code for which somebody must answer
            raise WrongInput(f"the tasks cannot be asked of {name or 'this model'}: {one_line(error)}") from error
    for said, times in Counter(record.getMessage().split("\n")[0][:200] for record in heard).most_common(3):
        progress.say(f"warning: lm-eval: {said}" + (f" ({times} times)" if times > 1 else ""))
    return {task: _paper(found, task, exam.tasks[task]) for task in exam.tasks}


def check_tokenizer(tokenizer: Any, spec: HarnessSpec, name: str) -> None:
    """Refuse to write messages without a template.

    Raises:
        WrongInput: there is none.
    """
    if spec.chat_template and not getattr(tokenizer, "chat_template", None):
        raise WrongInput(f"the tokenizer of {name or 'this model'} has no chat template; leave --chat-template away")


def batch_of(model: Any) -> int:
    """Requests in a forward pass, such that their logits stay small."""
    return max(1, min(MOST, LOGITS_AT_ONCE // (PROMPT * text_config(model.config).vocab_size)))


def results(exam: Exam, papers: Mapping[str, Paper], other: Mapping[str, Paper] | None = None) -> dict[str, Any]:
    """Put into JSON values what one model answered, or two to the same.

    Args:
        exam: the tasks.
        papers: of the first model.
        other: of the second.

    Returns:
        `tasks` by name with their metrics; `groups` and `means` of tasks where there are several.
    """
    found: dict[str, Any] = {"lm_eval": version("lm_eval"), "tasks": {}, "groups": {}, "means": {}}
    for name, paper in papers.items():
        its = None if other is None else other[name]
        metrics = {
            key: _cell(score, None if its is None else its.scores.get(key)) | {"higher_is_better": paper.higher[key]}
            for key, score in paper.scores.items()
        }
        same = {} if its is None else {"same_prompts": its.digest == paper.digest}
        found["tasks"][name] = {
            "items": paper.items, "few_shot": paper.shots, "version": paper.version, "digest": paper.digest, **same,
            "metrics": metrics,
        }  # fmt: skip
    for name, group in exam.groups.items():
        for wanted in group.aggregate_metric_list or ():
            members = [task.task_name for task in group.get_all_tasks()]
            weights = {task: papers[task].items if wanted.weight_by_size else 1 for task in members}
            keys = {key for task in members for key in papers[task].scores if key.split(",")[0] == wanted.metric}
            for key in sorted(keys):
                if (cell := _mean(papers, other, dict.fromkeys(members, key), weights)) is not None:
                    found["groups"].setdefault(name, {"tasks": members, "metrics": {}})["metrics"][key] = cell
    for what, metrics in _averaged(papers).items():
        if (cell := _mean(papers, other, metrics, dict.fromkeys(metrics, 1))) is not None:
            found["means"][what] = {"metrics": metrics, **cell}
    return found


def _averaged(papers: Mapping[str, Paper]) -> dict[str, dict[str, str]]:
    """Means over all tasks: what they are of -> the metric of each task. No mean is of two metrics unsaid."""
    if len(papers) < 2:
        return {}
    means = {metric: dict.fromkeys(papers, metric) for metric in ("acc", "acc_norm")}
    if papers.keys() <= CHOSEN.keys():
        means["acc, or acc_norm of hellaswag, arc_challenge and openbookqa"] = {task: CHOSEN[task] for task in papers}
    return {
        what: chosen
        for what, chosen in means.items()
        if all(metric in papers[task].scores for task, metric in chosen.items())
        and (what in ("acc", "acc_norm") or len(set(chosen.values())) > 1)
    }


def _mean(
    papers: Mapping[str, Paper],
    other: Mapping[str, Paper] | None,
    metrics: Mapping[str, str],
    weights: Mapping[str, float],
) -> dict[str, Any] | None:
    """The weighted mean of a score over tasks, which are independent; of the difference as well. None: not of all."""
    cells = list[dict[str, Any]]()
    for task, key in metrics.items():
        score = papers[task].scores.get(key)
        if score is None or (math.isfinite(score.value) and not score.items):
            return None
        cells.append(_cell(score, None if other is None else other[task].scores.get(key)))
    parts = [weights[task] / sum(weights[task] for task in metrics) for task in metrics]

    def mean(of: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        values, errors = [cell["value"] for cell in of], [cell["standard_error"] for cell in of]
        return {
            "value": None if None in values else math.fsum(map(operator.mul, parts, values)),
            "standard_error": None if None in errors else math.hypot(*map(operator.mul, parts, errors)),
        }

    more = {key: mean([cell[key] for cell in cells]) for key in ("against", "difference") if key in cells[0]}
    return mean(cells) | more


def _cell(score: Score, other: Score | None) -> dict[str, Any]:
    """A score, that of another model, and the difference, item by item where there are items."""
    cell: dict[str, Any] = _values(score)
    if other is None:
        return cell
    both = score.items and other.items  # not where the answers of one are not finite
    apart = [a - b for a, b in zip(score.items, other.items, strict=True)] if both else []
    cell["against"] = _values(other)
    cell["difference"] = _values(Score.of(apart) if apart else Score(score.value - other.value))
    if {*score.items, *other.items} <= {0.0, 1.0} and apart:
        gained, lost = apart.count(1.0), apart.count(-1.0)
        cell["difference"] |= {"gained": gained, "lost": lost, "p": sign_test(gained, lost)}
    return cell


def _values(score: Score) -> dict[str, Any]:
    error = score.error if score.error is not None and math.isfinite(score.error) else None
    return {"value": score.value if math.isfinite(score.value) else None, "standard_error": error}


def sign_test(gained: int, lost: int) -> float:
    """The probability that two equally good models differ so much: McNemar's test, exact and two-sided.

    Args:
        gained: items that only the first got right.
        lost: items that only the second did.
    """
    n = gained + lost
    tail = sum(math.comb(n, k) for k in range(min(gained, lost) + 1))
    return min(1.0, 2 * tail / 2**n)


def _error(items: Sequence[float]) -> float | None:
    return statistics.stdev(items) / math.sqrt(len(items)) if len(items) > 1 else None


def _paper(found: Mapping[str, Any], name: str, task: Any) -> Paper:
    from lm_eval.api.metrics import mean

    samples, totals = found["samples"][name], found["results"][name]
    finite = all(math.isfinite(number) for sample in samples for number in _numbers(sample["filtered_resps"]))
    scores, higher = dict[str, Score](), dict[str, bool]()
    for key, total in totals.items():
        metric, comma, how = key.partition(",")
        if not comma or metric.endswith("_stderr") or not isinstance(total, int | float):
            continue
        items = [sample.get(metric) for sample in samples if sample["filter"] == how]
        label = metric if how == "none" else key
        whole = all(isinstance(item, bool | int | float) for item in items)
        if not finite:  # the harness would take the first choice of each item for the model's
            scores[label] = Score(math.nan)
        elif whole and task.aggregation().get(metric, mean) is mean:
            scores[label] = Score.of([float(item) for item in items])
        else:
            scores[label] = Score(float(total))
        higher[label] = bool(task.higher_is_better().get(metric, True))
    digest = hashlib.sha256(repr([sample["arguments"] for sample in samples]).encode()).hexdigest()
    shots = task.get_config("num_fewshot") or 0
    return Paper(int(totals["sample_len"]), shots, found["versions"].get(name), digest, scores, higher)


def _numbers(answers: Any) -> list[float]:
    """All numbers in nested answers."""
    if isinstance(answers, float):
        return [answers]
    return [number for each in answers for number in _numbers(each)] if isinstance(answers, list | tuple) else []


class _Told:
    """Stands in for the harness's cache, and is told of every answer."""

    def __init__(self, stage: Stage) -> None:
        self._stage = stage

    def add_partial(self, *_: Any) -> None:
        self._stage.advance()


def _adapter(model: Any, tokenizer: Any, batch: int, progress: Progress, name: str) -> Any:
    from lm_eval.models import huggingface

    harness: Any = huggingface.HFLM  # its decorator hides what it takes from a type checker

    class Asked(harness):
        """Tells how far it is."""

        def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> Any:
            return self._with_stage(super().loglikelihood, requests)

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> Any:
            return self._with_stage(super().loglikelihood_rolling, requests)

        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> Any:
            return self._with_stage(super().generate_until, requests)

        def _with_stage(self, method: Any, requests: Any) -> Any:
            with progress.stage(f"tasks, {name}" if name else "tasks", len(requests)) as stage:
                self.cache_hook: Any = _Told(stage)
                return method(requests, disable_tqdm=True)

    own = copy.deepcopy(tokenizer)  # one without a padding token is given one
    begins = own.bos_token_id is not None or own.eos_token_id is not None
    start = None if begins else 0  # stands before an empty prompt, where the tokenizer has nothing that would
    return Asked(pretrained=model, tokenizer=own, batch_size=batch, backend="causal", prefix_token_id=start)
