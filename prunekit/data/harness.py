"""Tasks of lm-evaluation-harness: from names, files and folders to tasks that are ready to be asked.

A task file is a YAML file beside its rows. It may be anybody's: functions in it, and what its templates could reach of
Python, run only where the caller allows it. The harness prints, logs and seeds; here nobody else notices.
"""

from __future__ import annotations

import difflib
import logging
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, redirect_stdout
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import constants

from prunekit.data.rows import JSON, YAML, json_rows, kind, what_is
from prunekit.data.sources import hub_is_away
from prunekit.data.tasks import Question, task_rows
from prunekit.errors import WrongInput, one_line
from prunekit.system.progress import Progress

SUITE = "pruning-suite"
SUITE_TASKS: Mapping[str, str] = {  # zero-shot tasks that papers on pruning report -> where the harness keeps them
    "boolq": "super_glue/boolq",
    "piqa": "piqa",
    "hellaswag": "hellaswag",
    "winogrande": "winogrande",
    "arc_easy": "arc",
    "arc_challenge": "arc",
    "openbookqa": "openbookqa",
}
SEED = 1234  # of few-shot examples, as the harness has it
PICKLED = "pandas"  # what `datasets` calls rows in pickles, which some of its versions open
FORMATS = ("json", "csv", "parquet", "text", "arrow")  # of local data, by the name that `datasets` has for them


@dataclass(frozen=True)
class HarnessSpec:
    """What the harness asks, and how."""

    tasks: tuple[str, ...]  # names, files, or `SUITE`
    folder: str | None = None  # of task files
    chat_template: bool = False  # whether prompts are messages
    limit: int | None = None  # items of each task, from its first; None: all
    batch_size: int | None = None  # requests in a forward pass; None: as many as keep the logits small


@dataclass(frozen=True)
class Exam:
    """Tasks that are ready to be asked, of classes of the harness."""

    tasks: dict[str, Any] = field(default_factory=dict)
    groups: dict[str, Any] = field(default_factory=dict)


def check_installed() -> None:
    """Refuse to go on without the harness.

    Raises:
        ImportError: says what to install.
    """
    if find_spec("lm_eval") is None:
        raise ImportError("asking tasks needs lm-evaluation-harness: pip install 'prunekit[harness]'")


def check_names(names: Sequence[str], folder: str | None) -> None:
    """Refuse what can be refused without the harness.

    Raises:
        WrongInput: no task was named, or there is no such folder or file.
    """
    if not names:
        raise WrongInput(f"no task was named; name tasks, {SUITE}, or task files with --harness")
    if folder is not None and what_is(folder) != "folder":
        raise WrongInput(f"there is no folder {folder!r} of task files; give one with .yaml or .jsonl files")
    for name in names:
        if _is_file_name(name) and what_is(name) != "file":
            raise WrongInput(f"there is no task file {name!r}; give a .yaml or .jsonl file, or the name of a task")


def open_tasks(
    names: Sequence[str],
    folder: str | None = None,
    *,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> Exam:
    """Read tasks, with their rows.

    Args:
        names: of tasks and groups in the folder or of the harness; task files, .yaml or .jsonl; `SUITE`.
        folder: of task files.
        trust_remote_code: whether code in task files may run.
        progress: what the user is told.

    Raises:
        WrongInput: no such task, a file that is damaged or holds code that was not allowed, no rows, or a hub that does
            not answer.
        ImportError: the harness is not installed.
    """
    check_names(names, folder)
    check_installed()
    asked = [name for given in names for name in (SUITE_TASKS if given == SUITE else [given])]
    with quiet(trust_remote_code):
        shelf = _Shelf(folder, trust_remote_code)
        found = Exam()
        with (progress or Progress()).stage("reading tasks", len(asked)) as stage:
            for name in dict.fromkeys(asked):
                _add(found, shelf, name)
                stage.advance(note=name)
    return found


def questions(path: str) -> Iterator[Question]:
    """Read the questions of a task file of the harness, as it would ask them. Code in it never runs.

    Raises:
        WrongInput: as `open_tasks`; or it is no task of multiple choice.
    """
    for name, task in open_tasks([path]).tasks.items():
        if task.OUTPUT_TYPE != "multiple_choice":
            raise WrongInput(f"{path}: {name} is a task of {task.OUTPUT_TYPE}; questions are of multiple_choice")
        with quiet():
            prepare(task)
            task.build_all_requests(rank=0, world_size=1)
            rows: dict[int, list[Any]] = {}
            for instance in task.instances:
                rows.setdefault(instance.doc_id, []).append(instance)
            found = [_question(task, instances, f"{path}, item {number + 1}") for number, instances in rows.items()]
        yield from found


def prepare(task: Any) -> None:
    """Set what its file leaves open: no examples before an item, and which are drawn where it wants some."""
    if task.get_config("num_fewshot") is None:
        task.set_config(key="num_fewshot", value=0)
    task.set_fewshot_seed(seed=SEED)


@contextmanager
def quiet(trust_remote_code: bool = False) -> Iterator[list[logging.LogRecord]]:
    """Within, the harness is silent, draws the same numbers every time, and its templates reach nothing of Python.

    Args:
        trust_remote_code: whether they may.

    Yields:
        What it would have warned of.
    """
    import datasets
    import lm_eval.api.model
    import lm_eval.api.task
    import lm_eval.models.huggingface
    import lm_eval.utils
    import numpy as np
    import torch
    from jinja2.sandbox import SandboxedEnvironment

    heard: list[logging.LogRecord] = []
    logger, handler = logging.getLogger("lm_eval"), _Heard(heard)
    bars = datasets.is_progress_bar_enabled()
    drawn = random.getstate(), np.random.get_state()
    with ExitStack() as stack:
        stack.callback(random.setstate, drawn[0])
        stack.callback(np.random.set_state, drawn[1])
        stack.enter_context(torch.random.fork_rng(range(torch.cuda.device_count())))
        random.seed(0)  # some tasks shuffle choices when they are read
        np.random.seed(SEED)
        torch.manual_seed(SEED)
        stack.callback(setattr, logger, "propagate", logger.propagate)
        stack.callback(logger.removeHandler, handler)
        logger.propagate = False
        logger.addHandler(handler)
        if bars:
            stack.callback(datasets.enable_progress_bars)
            datasets.disable_progress_bars()
        for module in (lm_eval.api.task, lm_eval.api.model, lm_eval.models.huggingface):
            bar = vars(module)["tqdm"]
            stack.callback(setattr, module, "tqdm", bar)
            setattr(module, "tqdm", partial(_no_bar, bar))  # noqa: B010 - not one of the names that a type checker knows
        if not trust_remote_code:
            stack.callback(setattr, lm_eval.utils, "env", lm_eval.utils.env)
            there = lm_eval.utils.env
            sandbox = SandboxedEnvironment(undefined=there.undefined, keep_trailing_newline=True)
            sandbox.filters.update(there.filters)
            lm_eval.utils.env = sandbox
        stack.enter_context(redirect_stdout(StringIO()))  # stdout is for results
        yield heard


def _no_bar(bar: Any, *args: Any, **kwargs: Any) -> Any:
    return bar(*args, **kwargs | {"disable": True})


class _Heard(logging.Handler):
    def __init__(self, records: list[logging.LogRecord]) -> None:
        super().__init__(logging.WARNING)
        self._records = records

    def emit(self, record: logging.LogRecord) -> None:
        self._records.append(record)


class _Shelf:
    """Where tasks are looked for: files, a folder, the harness itself."""

    def __init__(self, folder: str | None, trust_remote_code: bool) -> None:
        from lm_eval.tasks import TaskManager

        self.folder, self.trust = folder, trust_remote_code
        for file in _files(folder, YAML):
            _parsed(file)
        self.manager: Any = TaskManager(include_path=folder, include_defaults=False)
        self.own = set(self.manager.all_tasks)  # of the folder
        self.rows = {file.stem: file for file in _files(folder, JSON)}
        self._every = False

    def spec(self, name: str) -> Any:
        """What the harness's own loader takes: the name of a task it knows, or its config."""
        if _is_file_name(name):
            path = Path(name).expanduser()
            return self._config(path) if kind(path) in YAML else _of_rows(path)
        if name in self.own:
            self._settle(name, set())
            return name
        if name in self.rows:
            return _of_rows(self.rows[name])
        self._look_further(name)
        return name

    def _look_further(self, name: str) -> None:
        """Let the harness find a task of its own, whose data is on the hub."""
        import lm_eval.tasks
        from lm_eval.tasks import TaskManager

        mine = sorted(self.own | self.rows.keys())
        there = f"in {self.folder} there are {', '.join(mine) or 'none'}" if self.folder else "no folder was given"
        if not constants.HF_HUB_OFFLINE and (why := hub_is_away()):
            raise WrongInput(
                f"no task file {name!r} ({there}), and tasks of lm-eval itself read their data from the hub: {why}; "
                "give task files with --harness-path FOLDER, or set HF_HUB_OFFLINE=1 to use what was downloaded before"
            )
        if name in SUITE_TASKS:  # to look through all files of the harness takes a while
            home = Path(lm_eval.tasks.__file__).parent / SUITE_TASKS[name]
            self._index(TaskManager(include_path=str(home), include_defaults=False))
        elif not self._every:
            self._every = True
            self._index(TaskManager())
        index = self.manager.task_index
        if name not in index:
            near = difflib.get_close_matches(name, index, n=3)
            guess = f"did you mean {' or '.join(near)}? " if near else ""
            raise WrongInput(f"no task {name!r}; {guess}{there}, and `lm-eval ls tasks` lists those of lm-eval")

    def _index(self, manager: Any) -> None:
        """Add tasks behind those of the folder, which go first."""
        for name, entry in manager.task_index.items():
            self.manager.task_index.setdefault(name, entry)

    def _settle(self, name: str, seen: set[str]) -> None:
        """Put the config of a task, checked and with its rows, where the harness looks; of a group, those of all."""
        entry = self.manager.task_index.get(name)
        if entry is None or name in seen:
            return
        seen.add(name)
        members = entry.tags
        if entry.yaml_path is not None:
            entry.cfg, entry.yaml_path = self._config(entry.yaml_path), None
            listed = entry.cfg.get("task")
            members = [_name_of(each) for each in listed] if isinstance(listed, list) else []
        for each in members:
            if each and each not in self.manager.task_index:
                self._look_further(each)
            self._settle(each, seen)

    def _config(self, path: Path) -> dict[str, Any]:
        from lm_eval.tasks._yaml_loader import load_yaml

        if not self.trust:
            _check_code(path, set())
        try:
            config = load_yaml(path)
        except Exception as error:  # of a file of somebody else's, and of its functions
            raise WrongInput(f"{path} is no task file: {one_line(error)}") from error
        if not {"task", "group"} & config.keys():
            raise WrongInput(f"{path} is no task file: it has neither 'task' nor 'group'")
        return _with_rows(config, path)


def _add(exam: Exam, shelf: _Shelf, name: str) -> None:
    spec = shelf.spec(name)
    try:
        found = shelf.manager.load([spec])
    except WrongInput:
        raise
    except Exception as error:  # of datasets, the hub, and any template
        said = "it has no items" if isinstance(error, IndexError) else one_line(error)
        raise WrongInput(f"cannot read task {name!r}: {said}") from error
    for key in ("tasks", "groups"):
        for each, value in found.get(key, {}).items():
            getattr(exam, key).setdefault(each, value)


def _files(folder: str | None, kinds: Sequence[str]) -> list[Path]:
    if folder is None:
        return []
    return sorted(file for file in Path(folder).expanduser().rglob("*") if file.is_file() and kind(file) in kinds)


def _is_file_name(name: str) -> bool:
    return kind(name) in (*YAML, *JSON)


def _name_of(member: Any) -> str:
    return str(member.get("task", "")) if isinstance(member, Mapping) else str(member)


def _parsed(path: Path) -> yaml.Node | None:
    """The nodes of a YAML file.

    Raises:
        WrongInput: it is damaged.
    """
    try:
        return yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise WrongInput(f"{path} is no YAML file, or is damaged: {one_line(error)}") from error


def _check_code(path: Path, seen: set[Path]) -> None:
    """Refuse a task file that runs code of its own or of the hub, as do those that it includes."""
    import lm_eval.tasks
    from lm_eval.api.registry import METRIC_REGISTRY

    path = path.expanduser().resolve()
    if path in seen or Path(lm_eval.tasks.__file__).parent in path.parents:
        return
    seen.add(path)
    what = None
    for key, node in _nodes(_parsed(path)):
        if node.tag == "!function" or key == "class" or ":python/" in node.tag:
            what = f"{key}: {getattr(node, 'value', '')}"
        elif key == "hf_evaluate" or (key == "metric" and node.value not in METRIC_REGISTRY):
            what = f"the metric {node.value}, of another library"
        elif key == "dataset_path" and node.value == PICKLED:
            what = f"dataset_path: {PICKLED}, rows in a pickle"
        elif key == "include" and isinstance(node, yaml.ScalarNode):
            _check_code(path.parent / node.value, seen)
    if what is not None:
        raise WrongInput(
            f"{path} brings code of its own ({what}), which runs only where the caller allows it, with "
            "--trust-remote-code or trust_remote_code=True"
        )


def _nodes(node: yaml.Node | None, key: str = "") -> Iterator[tuple[str, Any]]:
    """(the key it stands under, node) of all nodes."""
    if node is None:
        return
    yield key, node
    if isinstance(node, yaml.MappingNode):
        for name, value in node.value:
            yield from _nodes(value, str(name.value))
    elif isinstance(node, yaml.SequenceNode):
        for value in node.value:
            yield from _nodes(value, key)


# -- rows ---------------------------------------------------------------------------------------------


def _of_rows(path: Path) -> dict[str, Any]:
    """A task of the harness, of a task file of our own.

    Raises:
        WrongInput: it has no rows, or one without a wrong choice.
    """
    rows = list(task_rows(str(path)))
    if not rows:
        raise WrongInput(f"{path} has no rows; give questions, one JSON object a line")
    if any(len(row.choices) < 2 for row in rows):
        raise WrongInput(f"{path} has questions without a wrong choice, of which none can be chosen; add choices")
    spaced = all(row.between for row in rows)  # else the blanks stand with the prompts, which is the same to a model
    items = [
        {"prompt": row.prompt if spaced else row.prompt + row.between, "choices": [*row.choices], "answer": row.right}
        for row in rows
    ]
    return {
        "task": path.name.split(".")[0],
        "custom_dataset": _given({"test": items}),
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "prompt",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "target_delimiter": " " if spaced else "",
        "metric_list": [
            {"metric": metric, "aggregation": "mean", "higher_is_better": True} for metric in ("acc", "acc_norm")
        ],
    }


def _with_rows(config: dict[str, Any], path: Path) -> dict[str, Any]:
    """The same config, with local files beside its own; rows of JSON are read here, where damage has a line."""
    kwargs = config.get("dataset_kwargs")
    if config.get("dataset_path") not in FORMATS or not isinstance(kwargs, Mapping) or "data_files" not in kwargs:
        return config
    files = kwargs["data_files"]
    named = files if isinstance(files, Mapping) else {"train": files}
    splits = {
        split: [str(_beside(path, str(name))) for name in ([given] if isinstance(given, str) else given)]
        for split, given in named.items()
    }
    every = [name for names in splits.values() for name in names]
    if gone := [name for name in every if "*" not in name and what_is(name) != "file"]:
        raise WrongInput(f"{path} reads {gone[0]}, which is not there; put it beside the task file")
    if config["dataset_path"] == "json" and len(kwargs) == 1 and all(what_is(name) == "file" for name in every):
        rows = {split: [row for name in names for _, row in json_rows(Path(name))] for split, names in splits.items()}
        for split, found in rows.items():
            if not found:
                raise WrongInput(f"{path}: {', '.join(splits[split])} has no rows")
            if wrong := next((row for row in found if not isinstance(row, Mapping)), None):
                raise WrongInput(f"{path}: a row of {', '.join(splits[split])} is {wrong!r:.60}, not an object")
        kept = {key: value for key, value in config.items() if key not in ("dataset_path", "dataset_kwargs")}
        return kept | {"custom_dataset": _given(rows)}
    return config | {"dataset_kwargs": {**kwargs, "data_files": splits}}


def _beside(path: Path, name: str) -> Path:
    """A file that a task file names: beside it, or else from where the command runs, as the harness has it."""
    given = Path(name).expanduser()
    beside = path.expanduser().resolve().parent / given
    return beside if beside.exists() or not given.exists() else given.resolve()


def _given(splits: Mapping[str, Sequence[Any]]) -> Callable[..., Any]:
    """Rows, as the harness asks for a data set."""

    def made(**_: Any) -> Any:
        from datasets import Dataset

        return {split: Dataset.from_list([*rows]) for split, rows in splits.items()}

    return made


def _question(task: Any, instances: Sequence[Any], where: str) -> Question:
    item, right = instances[0].doc, None
    choices = task.doc_to_choice(item)
    right = task.doc_to_text(item) if task.multiple_input else task.doc_to_target(item)
    if isinstance(right, str) and right in choices:
        right = choices.index(right)
    if not isinstance(right, int) or not 0 <= right < len(choices):
        raise WrongInput(f"{where}: its target is {right!r:.60}, which is not one of its {len(choices)} choices")
    asked = [instance.args for instance in sorted(instances, key=lambda each: each.idx)][: len(choices)]
    return Question(tuple(prompt for prompt, _ in asked), tuple(answer for _, answer in asked), right)
