"""A model that is on disk, in further formats: `prunekit export`."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from prunekit.errors import CannotGoOn, NotVerified, WrongInput
from prunekit.export.compare import Row
from prunekit.export.formats import FILE, check_installed, why_not_run
from prunekit.export.record import FOLDER, Record
from prunekit.export.write import prove, write
from prunekit.models import paging
from prunekit.models.classes import LowRank, NarrowHeads
from prunekit.models.opening import load_tokenizer, skeleton, stored_as
from prunekit.models.places import located
from prunekit.models.shards import Shards
from prunekit.plugins.exporter import Exporter, Order, Probe, Product
from prunekit.plugins.registry import EXPORTERS
from prunekit.recipe.schema import Recipe
from prunekit.report import document as reporting
from prunekit.report.origin import PROCESSORS, taken_over
from prunekit.run.results import PROBE, load_small
from prunekit.run.verify import Check, Verdict, ask, fault_in, record_of_model
from prunekit.run.workplace import check_output, is_of_result, new_folder
from prunekit.space.forms import parse_form
from prunekit.system.files import MODEL_FILES, changed, extend_seal, read_json, sealed, write_bytes, write_json
from prunekit.system.progress import Progress
from prunekit.system.sizes import parse_size

OVERHEAD = 1.2  # of memory, beside the weights in float32


@dataclass(frozen=True)
class Exported:
    """What was written, and what its engines said."""

    folder: Path
    files: tuple[Path, ...]
    verdict: Verdict | None  # None: nothing was asked
    delivered: tuple[str, ...] = ()  # where it was sent


def export_model(
    source: str,
    exporters: Sequence[Exporter],
    output: Path | None = None,
    *,
    verify: bool = True,
    overwrite: bool = False,
    memory: str = "auto",
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> Exported:
    """Write a model in further formats, verify it, and only then put it in its place.

    Args:
        source: folder of a result, or of any model whose family is known.
        exporters: of places of their own.
        output: a new folder; None: beside the model, which takes formats that have a place of their own.
        verify: whether what was written is loaded and compared before it is put in its place.
        overwrite: whether a result that is in `output` may be replaced.
        memory: that may be taken; a model that needs more is read block by block.
        trust_remote_code: whether code in the folder may run.
        progress: what the user is told; None: nothing.

    Raises:
        WrongInput: says what was asked, what there is and what to do; before any long work.
        CannotGoOn: what was written is not the model.
    """
    progress, folder = progress or Progress(), Path(located(source)).expanduser()
    _check_places(source, folder, exporters, output, overwrite=overwrite)
    recipe = Recipe.load(folder, trust_remote_code=trust_remote_code) if (folder / "recipe.yaml").exists() else None
    order, blocks = _ordered(source, recipe, memory, trust_remote_code=trust_remote_code)
    for exporter in exporters:
        if order.units not in exporter.structures:
            there = ", ".join(sorted(exporter.structures))
            raise WrongInput(f"format {_name(exporter)!r} does not know structure {order.units}; it knows {there}")
        exporter.check(order)
    with progress.stage("open", 1) as stage:
        model = load_small(Path(source), blocks, trust_remote_code=trust_remote_code).eval()
        stage.advance()
    report = read_json(folder / "report.json") if (folder / "report.json").exists() else {}
    record = Record.read(folder) or (record_of_model(model) if blocks is None else None)
    product = Product(model, _tokenizer(source, trust_remote_code=trust_remote_code), report, order.code)
    probe = None
    if verify and record is not None:
        how = {"trust_remote_code": trust_remote_code}
        probe = _probe_of(model, record, source, order.parameters, blocks, **how)

    def make(place: Path) -> Verdict | None:
        with progress.stage("write", len(exporters)) as stage:
            for exporter in exporters:
                write([exporter], product, place)
                stage.advance(note=_name(exporter))
        return _verified(exporters, place, record, probe, progress)

    if output is not None:
        with new_folder(output, overwrite=overwrite) as made:
            verdict = make(made)
            _companions(folder, source, made, record)
            _note(exporters, made)
    else:  # made where nobody looks, and renamed when all of them are right
        with tempfile.TemporaryDirectory(prefix=".export-", dir=folder) as made:
            verdict = make(Path(made))
            for exporter in exporters:
                _put(Path(made, exporter.place), folder / exporter.place)
        if sealed(folder) is not None:
            _note(exporters, folder)
            files = [file for exporter in exporters for file in exporter.files(folder)]
            extend_seal(folder, [FILE, *(file.relative_to(folder).as_posix() for file in files)])
    target = output or folder
    delivered = [where for exporter in exporters if (where := exporter.deliver(target)) is not None]
    if verdict is not None:
        verdict = replace(verdict, folder=str(target))
    return Exported(target, tuple(f for each in exporters for f in each.files(target)), verdict, tuple(delivered))


def _check_places(
    source: str, folder: Path, exporters: Sequence[Exporter], output: Path | None, *, overwrite: bool
) -> None:
    """Refuse what is not installed, what is in the way, and a result that was changed."""
    for exporter in exporters:
        check_installed(exporter, f"format {_name(exporter)!r}")
    if output is not None:
        check_output(output, overwrite=overwrite, sources=[folder])
    elif not folder.is_dir():
        raise WrongInput(f"{source!r} is no folder, so nothing can be put beside its model; give --output")
    for exporter in exporters if output is None else ():
        if not exporter.place:
            raise WrongInput(f"format {_name(exporter)!r} is a folder of its own; give a new one with --output")
        if (folder / exporter.place).exists():
            raise WrongInput(f"{folder / exporter.place} exists and is not replaced; move it, or give --output")
    if sealed(folder) is not None and (faults := changed(folder)):
        raise WrongInput(f"{folder / faults[0]} is not what was written when the result was made; bring it back")


def _ordered(source: str, recipe: Recipe | None, memory: str, *, trust_remote_code: bool) -> tuple[Order, int | None]:
    """(what is exported as far as it is known before any work, bytes of blocks to hold at once)."""
    shape, adapter = skeleton(source, trust_remote_code=trust_remote_code)
    parameters, code = reporting.count(shape), "import" if recipe is None else recipe.code
    units = parse_form("groups" if recipe is None else recipe.structure).units
    if any(isinstance(module, LowRank) for module in shape.modules()):  # which a folder without a recipe may be, too
        units = "low-rank"
    if any(isinstance(module, NarrowHeads) for module in shape.modules()):  # whoever knows these knows the former
        units = "values"
    limit = parse_size(memory)
    blocks = None if limit is None or OVERHEAD * 4 * parameters < limit else max(1, limit // 5)
    return Order(adapter, units, code, parameters, _bytes_per_parameter(source), shape.config, settled=True), blocks


def _name(exporter: Exporter) -> str:
    return EXPORTERS.name_of(exporter) or type(exporter).__name__


def _note(exporters: Sequence[Exporter], folder: Path) -> None:
    """Write down with which options a folder's formats were made: by them their places are found again."""
    earlier = read_json(folder / FILE).get("exports", []) if (folder / FILE).exists() else []
    specs = [EXPORTERS.spec(exporter) for exporter in exporters if EXPORTERS.name_of(exporter) is not None]
    write_json(folder / FILE, {"exports": [*earlier, *specs]})


def _verified(
    exporters: Sequence[Exporter],
    folder: Path,
    record: Record | None,
    probe: Probe | None,
    progress: Progress,
) -> Verdict | None:
    """Let exporters prove what they have written, and their engines answer what the judged network did."""
    if probe is None or record is None:
        return None
    checks = list[Check]()
    with progress.stage("verify", len(exporters)) as stage:
        for exporter in exporters:
            name = _name(exporter)
            try:
                prove([exporter], folder, probe)
            except NotVerified as error:
                raise CannotGoOn(f"the {name} export was not kept: {error}") from error
            if exporter.engine:
                why = why_not_run(exporter)
                rows = [Row("not run", "", why)] if why is not None else ask(exporter, folder, record)
                checks.append(Check(name, exporter.engine, tuple(rows)))
            stage.advance(note=name)
    verdict = Verdict(str(folder), record.against, (), tuple(checks))
    for check in checks:
        if (fault := fault_in(check.rows, check.engine)) is not None:
            raise CannotGoOn(f"the {check.format} export was not kept: {fault}")
    return verdict


@torch.no_grad()
def _probe_of(
    model: Any, record: Record, source: str, parameters: int, blocks: int | None, *, trust_remote_code: bool
) -> Probe:
    """What an export must give back: the logits of the model on the record's windows, in float32."""
    ids, dtype = record.inquiry.ids[: max(1, PROBE // record.inquiry.ids.shape[1])], model.dtype
    if blocks is None:
        logits = stored_as(model, torch.float32)(ids, use_cache=False).logits
        stored_as(model, dtype)  # which has held these values before
        return Probe(ids, logits, parameters, None, dtype)
    cpu, float32 = torch.device("cpu"), torch.float32
    wide, _ = paging.opened(source, lambda _: float32, [cpu], blocks, trust_remote_code=trust_remote_code)
    logits = wide(ids, use_cache=False).logits
    paging.rest(wide)
    return Probe(ids, logits, parameters, blocks, dtype)


def _bytes_per_parameter(source: str) -> int:
    try:
        return max(tensor.dtype.itemsize for tensor in Shards.of(source).tensors.values())
    except WrongInput:  # an older format, which transformers reads
        return 4


def _tokenizer(source: str, *, trust_remote_code: bool) -> Any:
    try:
        return load_tokenizer(source, trust_remote_code)
    except WrongInput:
        return None  # a model may have none


def _companions(folder: Path, source: str, there: Path, record: Record | None) -> None:
    """What belongs to a result beside its model; of a plain model its legal files, and the record made just now."""
    listed = sealed(folder) or {}
    of_model = {file for pattern in MODEL_FILES for file in folder.glob(pattern)}
    for name in listed:
        apart = folder / name not in of_model or name in PROCESSORS
        if apart and is_of_result(f"result/{name}") and name != FILE:
            (there / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(folder / name, there / name)
    if not listed:
        for name, content in taken_over(source)[1].items():
            if not (there / name).exists():
                write_bytes(there / name, content)
    if record is not None and not (there / FOLDER).exists():
        record.write(there)


def _put(made: Path, place: Path) -> None:
    """Rename a finished file or folder to where nothing is."""
    if made.is_dir():
        made.rename(place)  # refused where a folder has files
    else:
        os.link(made, place)  # refused where a file is; the other name goes with its folder
