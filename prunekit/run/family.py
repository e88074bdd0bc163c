"""Models of several sizes for little more than the price of one: model, text and calibration passes are shared."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from prunekit.errors import WrongInput
from prunekit.recipe.schema import Recipe
from prunekit.report.document import promise
from prunekit.report.notebook import show_family
from prunekit.report.page import add_page
from prunekit.run.learn_budgets import learn_from, learns
from prunekit.run.prune import make_result, open_runs
from prunekit.run.results import Result, clear_result, write_result
from prunekit.run.search import run_search
from prunekit.run.session import Job
from prunekit.run.stages import Run
from prunekit.run.workplace import check_output, new_folder, publish, published
from prunekit.system.files import changed, copy_sealed, read_json, seal, write_json

SCHEMA = 1
FILE = "pareto.json"
BUDGETS = "budgets"  # folder of what an allocator has learnt from the searches of all members


@dataclass(frozen=True, eq=False)
class Family:
    """Results of several sparsities, and which of them no other beats."""

    document: Mapping[str, Any]  # pareto.json
    directory: Path | None = None
    held: Mapping[str, Result] = field(default_factory=dict)  # by folder, of a family that has no directory
    blocks: int | None = None  # bytes of blocks to hold at once of each member; None: all of them fit memory
    trust_remote_code: bool = False  # whether the caller has allowed code that comes with the model

    @property
    def rows(self) -> Sequence[Mapping[str, Any]]:
        """What pareto.json says of every member, by ascending sparsity."""
        return self.document["members"]

    @cached_property
    def members(self) -> tuple[Result, ...]:
        """All results, by ascending sparsity; those of a family with a directory are loaded when they are asked for."""
        how: dict[str, Any] = {"blocks": self.blocks, "trust_remote_code": self.trust_remote_code}
        return tuple(self.held.get(row["folder"]) or Result.load(self._folder(row), **how) for row in self.rows)

    @property
    def front(self) -> tuple[Mapping[str, Any], ...]:
        """The rows of members that no other beats in size (of metric latency: in time) and perplexity."""
        return tuple(row for row in self.rows if row["front"])

    def save(self, directory: str | Path, *, overwrite: bool = False) -> Path:
        """Write a folder for every member and pareto.json; all of it is there, or nothing.

        Args:
            directory: a new folder, or an empty one.
            overwrite: whether a family that is there may be replaced.

        Returns:
            The directory.

        Raises:
            WrongInput: the directory holds something and may not be overwritten.
            CannotGoOn: a member is not what was written when it was judged.
        """
        target = Path(directory)
        check_output(target, overwrite=overwrite, sources=[] if self.directory is None else [self.directory])
        with new_folder(target, overwrite=overwrite) as folder:
            for name, result in self.held.items():
                write_result(result, folder / name)
            if self.directory is not None:
                copy_sealed(self.directory, folder)
            write_json(folder / FILE, self.document)
        return target

    def _repr_html_(self) -> str:
        return show_family(self.document, self.directory)

    def _folder(self, row: Mapping[str, Any]) -> Path:
        assert self.directory is not None
        return self.directory / row["folder"]


def family(recipe: Recipe, job: Job) -> Family:
    """Prune after every recipe of a family (`Recipe.spread`); a recipe that names none is one of its own.

    A member that was finished before an interruption is not made again.

    Args:
        recipe: names its family.
        job: where the model comes from and the family goes.

    Returns:
        The results, by ascending sparsity.

    Raises:
        WrongInput: says what was asked, what there is and what to do; before any long work.
        PluginError: a plug-in broke its contract.
        CannotGoOn: what was written is not the same model when it is loaded.
    """
    asked, output = [member.sparsity for member in recipe.members], job.output
    with open_runs(recipe, job, asked) as (place, runs):
        if output is not None and published(place, output.resolve()):  # it was stopped while it tidied up
            return _family(read_json(output / FILE), output, {}, runs[0])
        done, results, before = place / "result", dict[str, Result](), None
        done.mkdir(exist_ok=True)
        for run in runs:
            clear_result(run.place / "written", run.parts.exporters)
        for run, (net, answer) in zip(runs, run_search(runs), strict=True):
            name = str(run.parts.recipe.sparsity)
            if (done / name).exists():
                if not (faults := changed(done / name)):
                    continue
                run.progress.say(f"{name}: {faults[0]} is not what was written; it is made anew")
                clear_result(done / name, run.parts.exporters)
            before = before or run.measure_dense()
            result = make_result(run, net, answer, before, None if output is None else output / name)
            if output is None:
                results[name] = result
                continue
            write_result(result, run.place / "written", run.progress.say)
            seal(run.place / "written")
            (run.place / "written").replace(done / name)
        learnt = output is not None and _learn(runs, done)
        reports = {
            str(share): results[str(share)].report if output is None else _report(done / str(share)) for share in asked
        }
        document = make_pareto(reports) | ({"budgets": BUDGETS} if learnt else {})
        if output is not None:
            write_json(done / FILE, document)
            if job.page:
                add_page(done, runs[0].progress.say)
            publish(done, output, overwrite=job.overwrite)
    return _family(document, output, results, runs[0])


def _learn(runs: Sequence[Run], done: Path) -> bool:
    """Let an allocator that learns from its searches answer any other budget too; say where that is."""
    recipe, allocator, place = runs[0].parts.recipe, runs[0].parts.allocator, runs[0].place.parent / "written"
    if not learns(recipe, allocator):
        return False
    if (done / BUDGETS).exists():
        if not changed(done / BUDGETS):
            return True
        clear_result(done / BUDGETS, ())
    clear_result(place, ())
    place.mkdir()
    try:
        learn_from(runs, allocator, place)
    except WrongInput as error:  # the models are there, and nothing was asked but them
        runs[0].progress.say(f"no other budget can be answered: {error}")
        clear_result(place, ())
        return False
    seal(place)
    place.replace(done / BUDGETS)
    return True


def _family(document: Mapping[str, Any], output: Path | None, held: Mapping[str, Result], run: Run) -> Family:
    blocks = run.blocks(sum(row["parameters"] for row in document["members"]))
    return Family(document, output, held, blocks, run.parts.recipe.trust_remote_code)


def make_pareto(reports: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Write the content of pareto.json.

    Args:
        reports: the members' report.json by folder, by ascending sparsity.
    """
    first = next(iter(reports.values()))
    rows = [{"folder": folder, **_row(report)} for folder, report in reports.items()]
    points = [(_size(report), row["perplexity"]) for report, row in zip(reports.values(), rows, strict=True)]
    for row, mine in zip(rows, points, strict=True):
        row["front"] = math.isfinite(mine[1]) and not any(
            other != mine and all(map(float.__le__, other, mine)) for other in points
        )
    return {
        "schema": SCHEMA,
        "model": first["model"],
        "metric": first["budget"]["metric"],
        "of": first["budget"]["of"],
        "label": first["losses"]["pruned"]["label"],
        "dense": {
            "parameters": first["dense"]["parameters"],
            "perplexity": first["losses"]["dense"]["perplexity"],
        },
        "members": rows,
        "token_forwards": sum(row["token_forwards"] for row in rows),
        "seconds": round(sum(row["seconds"] for row in rows) + max(map(_shared, reports.values())), 3),  # in all
    }


def _row(report: Mapping[str, Any]) -> dict[str, Any]:
    """A member's; seconds and token-forwards are those that it adds to what all share."""
    pruned, losses = report["pruned"], report["losses"]
    return {
        "sparsity": report["budget"]["sparsity_asked"],
        "realised": _realised(report),
        "parameters": pruned["parameters"],
        **({"not_zero": report["weights"]["not_zero"]} if "weights" in report else {}),
        "perplexity": losses["pruned"]["perplexity"],
        "objective": losses["objective"],
        "token_forwards": report["search"]["token_forwards"],
        "seconds": round(sum(report["seconds"].values()) - _shared(report), 3),
    }


def _realised(report: Mapping[str, Any]) -> float:
    """The share that is gone of what the budget counts."""
    budget = report["budget"]
    if (told := promise(report)) is not None:
        return 1 - told["realised"]
    if "weights" not in report:
        return budget["removed"]
    if budget["of"] == "blocks":
        return report["weights"]["sparsity"]
    gone = report["weights"]["in_linear_maps"] - report["weights"]["not_zero"]
    return report["pruned"]["sparsity_of_model"] + gone / report["dense"]["parameters"]


def _size(report: Mapping[str, Any]) -> float:
    """What the front weighs perplexity against."""
    if (told := promise(report)) is not None:
        return float(told["realised"])
    zeros = report["weights"]["in_linear_maps"] - report["weights"]["not_zero"] if "weights" in report else 0
    return float(report["pruned"]["parameters"] - zeros)


def _shared(report: Mapping[str, Any]) -> float:
    """Seconds that were spent once for all."""
    return sum(report.get("seconds_shared", {}).values())


def _report(folder: Path) -> dict[str, Any]:
    return read_json(folder / "report.json")
