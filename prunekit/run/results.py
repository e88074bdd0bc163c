"""A pruned model and how it came to be: packed, saved, verified in a fresh process, loaded again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from prunekit.data.tokens import TokenBatch
from prunekit.errors import CannotGoOn, NotVerified, WrongInput
from prunekit.export import hf
from prunekit.export.record import Record, continue_greedily
from prunekit.export.verify import TOLERANCE
from prunekit.export.write import prove, write
from prunekit.models import paging
from prunekit.models.opening import fingerprint, load_tokenizer, loaded, stored_as
from prunekit.models.spread import gather
from prunekit.plugins.exporter import Exporter, Probe, Product
from prunekit.plugins.registry import EXPORTERS
from prunekit.recipe.schema import Recipe
from prunekit.report import document as reporting
from prunekit.report.card import write as write_report
from prunekit.report.notebook import show_result
from prunekit.run.session import write_prices
from prunekit.run.stages import Run
from prunekit.run.verify import ask_engines
from prunekit.run.workplace import check_output, is_of_result, new_folder
from prunekit.search.supernet import Supernet
from prunekit.space.sites import Allocation
from prunekit.system.files import changed, clear, copy_sealed, read_json, sealed

PROBE = 1024  # tokens an export is verified on


@dataclass(frozen=True, eq=False)
class Result:
    """A pruned model and how it came to be."""

    model: PreTrainedModel
    tokenizer: Any
    recipe: Recipe  # complete: what was resolved is written in
    report: dict[str, Any]
    ledger: str  # JSON lines
    directory: Path | None = None
    probe: tuple[torch.Tensor, torch.Tensor] | None = None  # (ids, float32 logits) that an export must reproduce
    blocks: int | None = None  # bytes of blocks to hold at once, of a model that does not fit memory; None: it does
    record: Record | None = None  # what the judged network answered; None: what the probe tells is all there is

    @classmethod
    def load(cls, directory: str | Path, *, blocks: int | None = None, trust_remote_code: bool = False) -> Result:
        """Load a result that was saved, its model in the dtype of its file.

        Args:
            directory: of the result.
            blocks: bytes of blocks to hold at once; None: the model is loaded whole.
            trust_remote_code: whether code in the directory may run; nothing in it can allow that. A model of unequal
                layers needs none: it is of prunekit's own classes.

        Raises:
            WrongInput: there is no recipe, or no tokenizer; or its recipe asks for code that was not allowed.
        """
        folder = Path(directory)
        recipe = Recipe.load(folder, trust_remote_code=trust_remote_code)
        report = read_json(folder / "report.json")
        tokenizer = load_tokenizer(str(folder), trust_remote_code)
        ledger = (folder / "ledger.jsonl").read_text(encoding="utf-8")
        model = load_small(folder, blocks, trust_remote_code=trust_remote_code)
        return cls(model, tokenizer, recipe, report, ledger, folder, None, blocks)

    def _repr_html_(self) -> str:
        return show_result(self.report, self.directory)

    def save(self, directory: str | Path, *, overwrite: bool = False) -> Path:
        """Write weights, config, tokenizer, recipe, report, ledger and card; verified in a fresh process, then renamed.

        A result that was loaded is copied byte for byte; one that was changed since is verified against its model.

        Args:
            directory: a new folder, or an empty one.
            overwrite: whether a result that is there may be replaced.

        Returns:
            The directory.

        Raises:
            WrongInput: the directory holds something and may not be overwritten.
            CannotGoOn: what was written is not the same model when it is loaded.
        """
        target = Path(directory)
        check_output(target, overwrite=overwrite)
        with new_folder(target, overwrite=overwrite) as folder:
            if self.probe is not None:
                write_result(self, folder)
            elif self.directory is not None and sealed(self.directory) is not None and self._is_as(self.directory):
                copy_sealed(self.directory, folder)
            else:
                write_result(replace(self, probe=_own_probe(self.model)), folder)
        return target

    def _is_as(self, folder: Path) -> bool:
        """Whether nothing of it was changed since it was loaded from a folder, nor in the folder."""
        trusted = self.recipe.trust_remote_code
        if faults := changed(folder):
            raise CannotGoOn(f"{folder / faults[0]} is not what was written when the result was judged; bring it back")
        model = load_small(folder, 0, trust_remote_code=trusted)  # by blocks: there is one in memory
        return (
            fingerprint(model) == fingerprint(self.model)
            and self.report == read_json(folder / "report.json")
            and self.ledger == (folder / "ledger.jsonl").read_text(encoding="utf-8")
            and self.recipe == Recipe.load(folder, trust_remote_code=trusted)
        )


def make_export(
    run: Run, net: Supernet, plan: Allocation, small: PreTrainedModel, *, stays: bool
) -> tuple[PreTrainedModel, tuple[torch.Tensor, torch.Tensor], Record]:
    """Turn a small model into the one that will be exported.

    Args:
        run: the run that made it.
        net: the network that it was assembled from.
        plan: kept groups, or weights per row, by site.
        small: the model that was measured; afterwards in the dtype of the checkpoint.
        stays: whether the result stays in memory, where no fresh process compares it.

    Returns:
        (the model as it is exported, the probe that verifies it, as of `make_probe`, and the record that stays).

    Raises:
        CannotGoOn: it is not the model that was measured.
    """
    dense, tokens, continued = run.dense, run.draws.evaluation, None
    if paging.pager_of(small) is None:
        gather(small, torch.device("cpu"))
        probe = make_probe(stored_as(small, dense.dtype), tokens)
        continued = continue_greedily(lambda ids: small(ids, use_cache=False).logits, probe[0][0])
        if stays and run.parts.recipe.verify:
            compare(hf.to_transformers(small, dense.adapter), probe)
        exported = hf.to_transformers(stored_as(small, dense.dtype), dense.adapter)
    else:
        paging.rest(small)
        exported = hf.paged(net, plan, dense.dtype, torch.device("cpu"))
        probe = make_paged_probe(run, net, plan, tokens)
    return exported, probe, Record.of(*probe, dense.dtype, reporting.count(exported), continued)


@torch.no_grad()
def make_probe(model: nn.Module, tokens: TokenBatch) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute what an export must reproduce. The model's parameters are float32 afterwards; paged, it is at rest.

    Returns:
        (ids of a few windows, float32 logits of the model on them).
    """
    ids = tokens.first(PROBE).ids
    if paging.pager_of(model) is None:
        stored_as(model, torch.float32)
    logits = model(ids, use_cache=False).logits
    paging.rest(model)
    return ids, logits


@torch.no_grad()
def _own_probe(model: PreTrainedModel) -> tuple[torch.Tensor, torch.Tensor]:
    """As `make_probe`, of a model without text; it is not changed."""
    ids = torch.arange(64)[None] % model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
    return ids, stored_as(paging.whole(model).cpu(), torch.float32)(ids, use_cache=False).logits


@torch.no_grad()
def make_paged_probe(
    run: Run, net: Supernet, plan: Allocation, tokens: TokenBatch
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `make_probe`, of the network that was judged, over the dense model in float32: nothing is assembled."""
    ids, dense, weight = tokens.first(PROBE), run.dense, next(net.model.parameters())
    if (weight.dtype, weight.device.type) != (torch.float32, "cpu"):
        trusted, cpu = run.parts.recipe.trust_remote_code, torch.device("cpu")
        bound = dense.shares.blocks or 0
        model, _ = paging.opened(dense.name, lambda _: torch.float32, [cpu], bound, trust_remote_code=trusted)
        net = Supernet(model, net.adapter, net.space, net.errors, net.store, net.shares)
    logits = torch.cat([part.cpu() for _, part in net.logits(plan, ids)])
    net.rest()
    paging.rest(net.model)
    return ids.ids, logits


@torch.no_grad()
def compare(model: PreTrainedModel, probe: tuple[torch.Tensor, torch.Tensor]) -> None:
    """Compare a model in float32 with what is expected of it.

    Raises:
        CannotGoOn: its logits differ.
    """
    ids, logits = probe
    difference = float((model(ids, use_cache=False).logits - logits).abs().max())
    if not difference <= TOLERANCE:  # NaN is not within any tolerance
        raise CannotGoOn(
            f"the result was not kept: logits differ by {difference:.3g} from those of the network that was judged; "
            f"{TOLERANCE:.3g} is allowed"
        )


def write_result(result: Result, folder: Path, say: Callable[[str], None] = lambda _: None) -> None:
    """Write all files of a result; what exporters have written is verified before anyone can see it.

    Args:
        result: with its probe, if it is to be verified.
        folder: for it.
        say: told which engines have run it, and which could not be asked.

    Raises:
        CannotGoOn: what was written is not the same model when it is loaded.
    """
    exporters = [EXPORTERS.build(spec) for spec in result.recipe.exporters]
    write(exporters, Product(result.model, result.tokenizer, result.report, result.recipe.code), folder)
    write_prices(result.recipe, folder)
    (folder / "recipe.yaml").write_text(result.recipe.to_yaml())
    (folder / "ledger.jsonl").write_text(result.ledger)
    record = None
    if result.probe is not None:
        record = result.record or Record.of(*result.probe, result.model.dtype, reporting.count(result.model))
        record.write(folder)
    write_report(result.report, result.recipe, folder)
    if result.recipe.verify and result.probe is not None and record is not None:
        try:
            paging.rest(result.model)
            prove(
                exporters,
                folder,
                Probe(*result.probe, reporting.count(result.model), result.blocks, result.model.dtype),
            )
        except NotVerified as error:
            raise CannotGoOn(f"the result was not kept: {error}") from error
        ask_engines(exporters, folder, record, say)


def clear_result(folder: Path, exporters: Sequence[Exporter]) -> None:
    """Remove what an interrupted run has left of a result.

    Raises:
        WrongInput: there is something else.
    """
    own = {file for exporter in exporters for file in exporter.files(folder)}
    if left := clear(folder, lambda file: file in own or is_of_result(f"result/{file.relative_to(folder).as_posix()}")):
        raise WrongInput(f"{left[0]} is where a result will be written, and prunekit has not made it; move it away")


def load_small(folder: Path, blocks: int | None, *, trust_remote_code: bool) -> PreTrainedModel:
    """Load the model of a result in the dtype of its file.

    Args:
        folder: of the result.
        blocks: bytes of blocks to hold at once; None: the model is loaded whole.
        trust_remote_code: whether code in the folder may run.
    """
    if blocks is None:
        return loaded(str(folder), dtype="auto", trust_remote_code=trust_remote_code)
    cpu = torch.device("cpu")
    return paging.opened(str(folder), lambda stored: stored, [cpu], blocks, trust_remote_code=trust_remote_code)[0]
