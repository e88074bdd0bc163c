"""A result in the engines that run it, beside what the judged network answered: `prunekit verify`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from prunekit.errors import CannotGoOn, NotVerified, WrongInput
from prunekit.export.compare import Row, compare
from prunekit.export.formats import choose_formats, why_not_run
from prunekit.export.question import Question
from prunekit.export.record import FOLDER, OWN, Record, continue_greedily
from prunekit.measure.ratios import FEWEST
from prunekit.measure.rounds import interleaved, own_time
from prunekit.measure.speed import ROUNDS, SECONDS, Speed, compared
from prunekit.models import paging
from prunekit.models.adapters.find import adapter_for
from prunekit.models.opening import loaded, stored_as
from prunekit.models.places import located
from prunekit.models.shards import INDEX, WEIGHTS, Shards
from prunekit.plugins.exporter import Exporter
from prunekit.recipe.schema import Recipe
from prunekit.space.forms import parse_form
from prunekit.space.prices import Workload
from prunekit.system.files import changed, read_json, sealed
from prunekit.system.progress import Progress

WINDOW = 128  # tokens of a model without record
PROMPT, NEW = 256, 32  # tokens that are timed
LOADS = "loads"  # the row of an engine that does not run the files


@dataclass(frozen=True)
class Check:
    """What one engine says of one format."""

    format: str
    engine: str
    rows: tuple[Row, ...]
    speed: tuple[tuple[str, str, str, str], ...] = ()  # what, dense, pruned, ratio


@dataclass(frozen=True)
class Verdict:
    """All that was compared."""

    folder: str
    against: str  # what the answers are of
    rows: tuple[Row, ...]  # of the files
    checks: tuple[Check, ...]

    @property
    def agrees(self) -> bool:
        """Whether nothing differs."""
        return all(row.agrees is not False for rows in (self.rows, *(c.rows for c in self.checks)) for row in rows)

    def as_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return {"agrees": self.agrees, **asdict(self)}


def verify_result(
    source: str,
    *,
    engines: Sequence[str] | None = None,
    against: str | None = None,
    question: str | None = None,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> Verdict:
    """Compare what is in a folder with what its report says, and what engines make of it with the judged network.

    Args:
        source: folder of a result, or of a model that was exported.
        engines: by their names; None: one that is installed for each file or folder of the result.
        against: folder of the dense model in the same formats, timed in turns with this one; None: nothing is timed.
        question: what every engine answers with the likeliest tokens, by the chat template where there is one.
        trust_remote_code: whether code in the folder may run.
        progress: what the user is told; None: nothing.

    Raises:
        WrongInput: no such folder, engine or dense model, an engine that is not installed, or nothing to compare with.
    """
    progress, folder = progress or Progress(), Path(located(source)).expanduser()
    if not folder.is_dir():
        raise WrongInput(f"{source!r} is no folder; verify reads the files of a result")
    recipe = Recipe.load(folder, trust_remote_code=trust_remote_code) if (folder / "recipe.yaml").exists() else None
    formats = choose_formats(folder, engines, () if recipe is None else recipe.exporters)
    lost = [] if sealed(folder) is None else changed(folder)
    if mine := [name for name in lost if name.startswith(f"{FOLDER}/")]:
        raise WrongInput(f"{folder / mine[0]} is not what was written when the result was judged; bring it back")
    if against is not None:
        _check_dense(against, formats, named=engines is not None)
    record = Record.read(folder)
    if record is None:
        if all(exporter.place == "" for exporter in formats.values()):
            raise WrongInput(
                f"{folder} has no record of a network that was judged ({FOLDER}/), as prune leaves it beside its "
                "results; there is nothing to compare it with"
            )
        record = record_of(folder, trust_remote_code=trust_remote_code)
    trust = trust_remote_code
    asked = None if question is None else Question.of(question, folder, trust_remote_code=trust)
    checks = list[Check]()
    for name, exporter in formats.items():
        if engines is None and (why := why_not_run(exporter)) is not None:
            checks.append(Check(name, exporter.engine, (Row("not run", "", why),)))
            continue
        with progress.stage(f"verify {name}", 1) as stage:
            rows = ask(exporter, folder, record)
            if asked is not None and all(row.agrees is not False for row in rows):
                rows.append(Row("answer", "", asked.put(exporter, folder)))
            stage.advance()
        runs = all(row.what != LOADS or row.agrees is not False for row in rows)
        speed = () if against is None or not runs else _paces(exporter, folder, against, progress)
        checks.append(Check(name, exporter.engine, tuple(rows), tuple(speed)))
    return Verdict(str(folder), record.against, tuple(_sizes(folder, lost)), tuple(checks))


def _check_dense(against: str, formats: Mapping[str, Exporter], *, named: bool) -> None:
    """Refuse, before any work, a dense model that is no folder, or that is not there in a format that is timed.

    Args:
        against: its folder.
        formats: that are timed.
        named: whether the caller asked for all of them; otherwise some may be missing, and their rows will say so.

    Raises:
        WrongInput: says what is not there.
    """
    folder = Path(located(against)).expanduser()
    if not folder.is_dir():
        raise WrongInput(f"against (--against) takes the folder of a dense model, and {against!r} is none")
    missing = {name: exporter for name, exporter in formats.items() if not exporter.files(folder)}
    if missing and (named or len(missing) == len(formats)):
        name, exporter = next(iter(missing.items()))
        raise WrongInput(
            f"{folder / exporter.place} is not there, and a dense model is timed in the same format; make it with "
            f"prunekit export {folder} --format {name}"
        )


def ask(exporter: Exporter, folder: Path, record: Record) -> list[Row]:
    """Ask the engine of an exporter what a record asks, and compare; what does not load is a row that differs."""
    path = folder / exporter.place
    try:
        response = exporter.answers(path, record.inquiry)
    except NotVerified as error:
        return [Row(LOADS, "yes", str(error), False)]
    return compare(record, response, exporter.tolerance(path, getattr(torch, record.dtype)))


def ask_engines(exporters: Sequence[Exporter], folder: Path, record: Record, say: Callable[[str], None]) -> None:
    """Ask the engines that no exporter has asked yet of what was just written, as far as they are installed.

    Args:
        exporters: whose files are there and proved.
        folder: of the result.
        record: of the network that was judged.
        say: told which engine has agreed, and which could not be asked.

    Raises:
        CannotGoOn: an engine answers something else.
    """
    for exporter in exporters:
        if not exporter.engine:
            continue
        if (why := why_not_run(exporter)) is not None:
            say(f"{exporter.engine} was not asked whether it runs the result: {why}")
        elif not exporter.asks_engine:
            if (fault := fault_in(ask(exporter, folder, record), exporter.engine)) is not None:
                raise CannotGoOn(f"the result was not kept: {fault}")
            say(f"{exporter.engine} answers what {record.against} does")


def fault_in(rows: Sequence[Row], engine: str) -> str | None:
    """What an engine answers otherwise, the first of it; None: nothing."""
    wrong = next((row for row in rows if row.agrees is False), None)
    return None if wrong is None else f"{wrong.what} in {engine}: {wrong.found}, not {wrong.judged}"


@torch.no_grad()
def record_of(folder: Path, *, trust_remote_code: bool = False) -> Record:
    """Ask the model of a folder itself, as transformers loads it, in float32: of a model that nothing was judged of."""
    model = loaded(str(folder), dtype="auto", trust_remote_code=trust_remote_code).eval()
    return record_of_model(model)


@torch.no_grad()
def record_of_model(model: Any) -> Record:
    """As `record_of`, of a model in memory, which is the same afterwards."""
    dtype, parameters = model.dtype, sum(p.numel() for p in model.parameters())
    vocabulary = int(model.get_input_embeddings().weight.shape[0])
    length = min(WINDOW, int(getattr(model.config, "max_position_embeddings", None) or WINDOW))
    windows = max(1, -(-WINDOW // length))
    ids = torch.randint(vocabulary, (windows, length), generator=torch.Generator().manual_seed(0))
    stored_as(model, torch.float32)
    logits = model(ids, use_cache=False).logits
    continued = continue_greedily(lambda text: model(text, use_cache=False).logits, ids[0])
    stored_as(model, dtype)
    return Record.of(ids, logits, dtype, parameters, continued, OWN)


def _sizes(folder: Path, lost: Sequence[str]) -> list[Row]:
    """What is in the files beside what the list of files and the report say."""
    rows = list[Row]()
    if sealed(folder) is not None:
        said = f"{', '.join(lost[:3])} changed" if lost else "unchanged"
        rows.append(Row("files", "as they were written", said, not lost))
    if not (folder / "report.json").exists() or not any((folder / name).exists() for name in (WEIGHTS, INDEX)):
        return rows
    report, shards = read_json(folder / "report.json"), Shards.of(str(folder))
    promised: Mapping[str, Any] = report["pruned"]
    model = paging.shaped(str(folder), trust_remote_code=False)
    adapter = adapter_for(model.config.model_type)
    sizes = {name: torch.Size(tensor.shape).numel() for name, tensor in shards.tensors.items()}
    blocks = sum(size for name, size in sizes.items() if f"{adapter.layers}." in name)
    for what, wanted, found in (
        ("parameters in the files", promised["parameters"], sum(sizes.values())),
        ("of these in blocks", promised["block_parameters"], blocks),
    ):
        rows.append(Row(what, f"{wanted:,}", f"{found:,}", wanted == found))
    if (weights := report.get("weights")) is not None:
        sites = adapter.sites_of(model, parse_form(weights["structure"]))
        kept = sum(int(shards.read(f"{site.name}.weight").count_nonzero()) for site in sites)
        rows.append(
            Row("not zero in linear maps", f"{weights['not_zero']:,}", f"{kept:,}", kept == weights["not_zero"])
        )
        return rows
    wanted_sites = [site["parameters"] for site in report["sites"] if site["kept"]]
    sites = adapter.sites(model)
    found_sites = [site.parameters(site.n_groups) for site in sites]
    beside = (adapter.patch(adapter.blocks(model)[site.block], site) for site in sites)
    more = [0 if patch is None else sum(p.numel() for p in patch.parameters()) for patch in beside]
    # a recovery step may have given the map of a site a bias, or put a map beside it
    same = len(found_sites) == len(wanted_sites) and all(
        found - patch - wanted in (0, site.d_out)
        for wanted, found, patch, site in zip(wanted_sites, found_sites, more, sites, strict=True)
    )
    rows.append(Row("sub-layers", f"{len(wanted_sites)} of their sizes", f"{len(found_sites)}", same))
    return rows


def _paces(exporter: Exporter, folder: Path, against: str, progress: Progress) -> list[tuple[str, str, str, str]]:
    """Size on disk, and prefill and decode speed, of the dense model and of this one, in turns."""
    folders = {"dense": Path(against).expanduser(), "pruned": folder}
    if not exporter.files(folders["dense"]):
        return [("speed", f"{folders['dense'] / exporter.place} is not there: export the dense model too", "", "")]
    dense, pruned = (sum(file.stat().st_size for file in exporter.files(each)) for each in folders.values())
    rows = [("size on disk", f"{dense / 1e6:,.1f} MB", f"{pruned / 1e6:,.1f} MB", f"{pruned / dense:.2f}")]
    work = _workload(folder)
    try:
        timers = {name: exporter.timer(each / exporter.place) for name, each in folders.items()}
        turns = {name: timer for name, timer in timers.items() if timer is not None}
        if len(turns) < len(timers):
            return [*rows, ("speed", f"{exporter.engine} is not timed", "", "")]
        calls = {name: lambda timer=timer: timer(work) for name, timer in turns.items()}
        times = interleaved(calls, progress, "speed", rounds=ROUNDS, fewest=FEWEST, seconds=SECONDS)
    except NotVerified as error:
        return [*rows, ("speed", str(error), "", "")]
    told, own = torch.get_num_threads(), own_time(torch.device("cpu"))
    paces = [
        Speed(
            tuple(work.prompt * 1e9 / read for read, _ in times[name]),
            tuple(work.new_tokens * 1e9 / made for _, made in times[name]),
            work, "cpu", told, own,
        )
        for name in folders
    ]  # fmt: skip
    return [*rows, *compared(*paces), ("timed", str(paces[1]), "", "")]


def _workload(folder: Path) -> Workload:
    """One prompt, as long as models of this folder take."""
    config = read_json(folder / "config.json") if (folder / "config.json").exists() else {}
    room = config.get("max_position_embeddings")
    room = room if isinstance(room, int) and room > 2 else PROMPT + NEW
    new = min(NEW, max(1, room // 4))
    return Workload(1, min(PROMPT, room - new), new)
